"""A form in llguidance's own notation: JSON around a schema, a regex or a Lark grammar. Nothing is compiled here."""

import json
from collections.abc import Sequence

from zif.contract import StructuredKind, StructuredOutput
from zif.errors import RequestError

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of JSON. Bounded: a model that begins to repeat line breaks must come back to the answer."""
ASCII_CLASSES = "dws"
"""The classes that a regex means in ASCII, as in most grammars of data: \\d is 0 to 9."""


def grammar_text(form: StructuredOutput) -> str:
    """Return the grammar of a form. Raises `RequestError` when it cannot be written down."""
    try:
        own = _own_grammar(form)
        return own if form.or_grammar is None else _either(own, form.or_grammar)
    except ValueError as error:
        raise RequestError(f"{form.kind.value} cannot be read: {error}") from error


def _own_grammar(form: StructuredOutput) -> str:
    from llguidance import LLMatcher, regex_to_lark

    if form.kind is StructuredKind.REGEX:
        return str(LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(form.text, ASCII_CLASSES)}/"))
    if form.kind is StructuredKind.CHOICE:
        return str(LLMatcher.grammar_from_lark(_any_of(form.choice or ())))
    if form.kind is StructuredKind.GRAMMAR:
        return str(LLMatcher.grammar_from_lark(form.text))
    schema = form.text if form.kind is StructuredKind.JSON_SCHEMA else '{"type": "object"}'
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))


def _either(own: str, other: str) -> str:
    """Return a grammar of which both are alternatives: `own` in Lark or in llguidance's JSON, `other` in Lark."""
    is_json = own.startswith("{")
    part: dict[str, object] = json.loads(own)["grammars"][0] if is_json else {"lark_grammar": own}
    answer = {"name": "answer", "lark_grammar": "start: @form | @other"}
    return json.dumps({"grammars": [answer, {**part, "name": "form"}, {"name": "other", "lark_grammar": other}]})


def _any_of(choices: Sequence[str]) -> str:
    """Return a Lark grammar of literal alternatives; its strings are those of JSON, in ASCII."""
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)
