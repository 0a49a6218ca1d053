"""Answers as a format's family writes them: what the parser reads, the other way round.

For round trips in tests, and for showing how a family looks. Not a chat template: it writes one answer, no prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from zif.parsing.formats import Format


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call to write; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


def write_answer(form: Format, text: str = "", reasoning: str = "", calls: Sequence[WrittenCall] = ()) -> str:
    """Write an answer: reasoning, then text, then calls, each only where there is some.

    Asserts that the family has what is asked for.
    """
    parts = []
    written = form.written
    if reasoning:
        assert written.reasoning is not None, f"format {form.name!r} has no reasoning"
        parts.append(Template(written.reasoning).substitute(reasoning=reasoning))
    if text:
        parts.append(Template(written.text).substitute(text=text))
    if calls:
        between = written.between.join(_call(form, call) for call in calls)
        parts.append(Template(written.calls).substitute(calls=between))
    return "".join(parts)


def _call(form: Format, call: WrittenCall) -> str:
    written = form.written
    assert written.call is not None, f"format {form.name!r} has no calls"
    arguments = call.arguments
    if written.parameter is not None:
        parameter = Template(written.parameter)
        values = json.loads(call.arguments).items()
        arguments = "".join(parameter.substitute(key=key, value=_value_text(value)) for key, value in values)
    return Template(written.call).substitute(name=call.name, arguments=arguments)


def _value_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
