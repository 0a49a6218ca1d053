"""What form an answer must have, as a value, and what a runner asks so that no token breaks it.

Whoever implements `Grammars` compiles; a runner only follows tokens and applies masks. Names follow vLLM's
`StructuredOutputsParams` where the meaning is the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from zif.contract.arrays import HostArray
from zif.errors import RequestError

MAX_SCHEMA_CHARACTERS = 1 << 17
MAX_CHOICE_CHARACTERS = 1 << 17
"""Of all choices together."""
MAX_REGEX_CHARACTERS = 1 << 11
MAX_GRAMMAR_CHARACTERS = 1 << 16
MAX_GRAMMAR_LINES = 1000
"""Rules refer to each other, and a compiler may recurse along the chain."""
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_MEMBERS = 1000
"""Of one object of a schema: work may grow with the square of the properties of one object."""
MAX_SCHEMA_REFERENCES = 500


class StructuredKind(StrEnum):
    """How a form is written down."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """The form of an answer: exactly one of the fields.

    `json` is a JSON schema, an object or its text, which is what it becomes. `json_object` asks for any JSON object.
    `regex` must match the whole answer; its classes are those of ASCII. `choice` lists the only answers there are.
    `grammar` is a context-free grammar in Lark's notation whose start rule is `start`. `or_grammar` may stand beside
    any of them: one that the answer may follow in place of the form. Values out of bounds raise `RequestError`.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    or_grammar: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object={self.json_object!r} must be True or False")
        given = [name for name in _FIELDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured output is given {', '.join(given) or 'nothing'}; give exactly one of {', '.join(_FIELDS)}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.regex is not None:
            _check_text("regex", self.regex, MAX_REGEX_CHARACTERS)
        elif self.grammar is not None:
            _check_grammar("grammar", self.grammar)
        if self.or_grammar is not None:
            _check_grammar("or_grammar", self.or_grammar)

    @property
    def kind(self) -> StructuredKind:
        """Return which field is given."""
        return next(kind for name, kind in _FIELDS.items() if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """Return the form as text: two of a kind with equal text and equal `or_grammar` are the same form."""
        if self.choice is not None:
            return json.dumps(list(self.choice))
        value = self.json or self.regex or self.grammar or ""
        return value if isinstance(value, str) else _schema_text(value)


_FIELDS = {
    "json": StructuredKind.JSON_SCHEMA,
    "json_object": StructuredKind.JSON_OBJECT,
    "regex": StructuredKind.REGEX,
    "choice": StructuredKind.CHOICE,
    "grammar": StructuredKind.GRAMMAR,
}


class GrammarState(Protocol):
    """Where one request stands in its grammar. It follows known tokens; guesses leave no trace."""

    @property
    def num_followed(self) -> int:
        """Count the generated tokens that were followed."""
        ...

    def follow(self, token_ids: Sequence[int]) -> None:
        """Go on by the next known tokens of the output."""
        ...

    def fill_masks(self, guesses: Sequence[int], masks: HostArray) -> None:
        """Write which tokens may come next: into `masks[0]` after the known ones, `masks[1]` after the first guess, ...

        masks: [1 + number of guesses, (V + 31) // 32], int32, contiguous; bit b of word w allows token 32 * w + b.
        End-of-sequence tokens are allowed where the grammar may end. Where there is a `fault`, no token is allowed;
        after a guess that the grammar forbids, any.
        """
        ...

    @property
    def fault(self) -> str | None:
        """Say why no mask can be told, None when it can."""
        ...


class Grammars(Protocol):
    """Grammars of one model's vocabulary."""

    def begin(self, form: StructuredOutput) -> GrammarState:
        """Return the state before the first generated token. A form that cannot be compiled gives a state at fault."""
        ...


def _check_text(name: str, value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name}={value!r} must be text")
    if not value or "\0" in value:
        raise RequestError(f"{name}={value[:80]!r} is empty or holds a NUL character; give the {name} itself")
    if len(value) > limit:
        raise RequestError(f"{name} has {len(value)} characters; the limit is {limit}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds {value[error.start]!r} at {error.start}, which is no character") from error
    return value


def _check_grammar(name: str, value: object) -> None:
    if len(lines := _check_text(name, value, MAX_GRAMMAR_CHARACTERS).splitlines()) > MAX_GRAMMAR_LINES:
        raise RequestError(f"{name} has {len(lines)} lines; the limit is {MAX_GRAMMAR_LINES}")


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise RequestError(f"choice={value!r} must be a list of at least one text")
    if len(value) > MAX_CHOICES:
        raise RequestError(f"choice lists {len(value)} texts; the limit is {MAX_CHOICES}")
    for text in value:
        _check_text("choice", text, MAX_CHOICE_CHARACTERS)
    _check_text("choice", "".join(value), MAX_CHOICE_CHARACTERS)
    return tuple(value)


def _schema_text(value: object) -> str:
    """Return a schema as text, checked. Raises `RequestError` when it is no JSON object, too large or too deep."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        schema = json.loads(_check_text("json", text, MAX_SCHEMA_CHARACTERS))
    except RequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"json is no JSON schema ({type(error).__name__}: {error}); give a schema object") from error
    if not isinstance(schema, dict):
        raise RequestError(f"json holds a {type(schema).__name__}; give a JSON schema, which is an object")
    if (num_references := text.count('"$ref"')) > MAX_SCHEMA_REFERENCES:
        raise RequestError(f"json holds {num_references} references; the limit is {MAX_SCHEMA_REFERENCES}")
    _check_shape(schema)
    return text


def _check_shape(schema: object) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise RequestError(f"json nests deeper than {MAX_SCHEMA_DEPTH} levels; give a flatter schema")
        objects = [value for value in level if isinstance(value, dict)]
        if (num_members := max(map(len, objects), default=0)) > MAX_SCHEMA_MEMBERS:
            raise RequestError(f"json has an object of {num_members} members; the limit is {MAX_SCHEMA_MEMBERS}")
        lists = [value for value in level if isinstance(value, list)]
        level = [item for value in objects for item in value.values()] + [item for value in lists for item in value]
