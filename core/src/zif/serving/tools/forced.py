"""Calls that must be made: the grammar that constrains the answer to them, and its reading back.

A forced answer is JSON and nothing else, whatever form the model's own calls have, so the parsers here know no model
family: `[{"name": ..., "parameters": {...}}, ...]` for calls that are required, the arguments alone for a named one.
"""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from zif.contract import StructuredOutput
from zif.parsing.events import ParseEvent, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.serving.tools.schemas import ANY_OBJECT, ToolSchemas, with_references

MAX_CALLS = 128
MAX_HEAD_CHARACTERS = 4096
"""A call's object up to its arguments. The grammar writes less; more means that no grammar was at work."""

SPACING: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Told to llguidance: nobody reads these blanks, and a weak model that may write blanks writes nothing else."""


def named_call_form(functions: Sequence[Mapping[str, Any]], name: str) -> StructuredOutput:
    """Return the form of an answer that is the arguments of the function `name`.

    Raises RequestError for a schema that is longer than a grammar.
    """
    return _form(ToolSchemas().parameters(next(function for function in functions if function["name"] == name)))


def required_calls_form(functions: Sequence[Mapping[str, Any]], parallel: bool) -> StructuredOutput:
    """Return the form of an answer that is a list of at least one call, of exactly one unless `parallel`.

    Raises RequestError for schemas that are longer than a grammar.
    """
    return _form(required_calls_schema(functions, parallel))


def _form(schema: Mapping[str, Any]) -> StructuredOutput:
    return StructuredOutput(grammar="start: %json " + json.dumps({**schema, "x-guidance": SPACING}))


def required_calls_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """Return the schema of a list of calls.

    A function's schema that refers to itself or its parts moves to the root's definitions, and its references with it.
    """
    items = calls_schema(functions, frozenset(function["name"] for function in functions))
    definitions = items.pop("$defs", None)
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_CALLS if parallel else 1,
        "items": items,
    }
    return schema | ({"$defs": definitions} if definitions else {})


def calls_schema(functions: Sequence[Mapping[str, Any]], strict: Container[str]) -> dict[str, Any]:
    """Return the schema of one call; the arguments of functions that are not `strict` are any object.

    Raises RequestError for schemas that are longer than a grammar.
    """
    definitions: dict[str, Any] = {}
    schemas, calls = ToolSchemas(), []
    for index, function in enumerate(functions):
        parameters = schemas.parameters(function) if function["name"] in strict else {**ANY_OBJECT}
        calls.append(_call(function["name"], parameters, f"tool{index}", definitions))
    return {"anyOf": calls} | ({"$defs": definitions} if definitions else {})


def _call(name: str, parameters: dict[str, Any], root: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one call. Where parameters refer to their own parts, they become the definition `root`."""
    moved = with_references(parameters, f"#/$defs/{root}")
    if moved != parameters:
        definitions[root] = moved
        parameters = {"$ref": f"#/$defs/{root}"}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


class NamedCall:
    """The parser of an answer that is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False
        self._scan = JsonDepth()

    def feed(self, text: str) -> list[ParseEvent]:
        """Pass arguments on, up to the end of their object."""
        if not text or self._scan.ended:
            return []
        end = next((at + 1 for at, _ in self._scan.closings(text) if self._scan.ended), len(text))
        events: list[ParseEvent] = [] if self._begun else [ToolCallBegin(0, self._name)]
        self._begun = True
        events.append(ToolCallArguments(0, text[:end]))
        return [*events, ToolCallEnd(0)] if self._scan.ended else events

    def finish(self) -> list[ParseEvent]:
        """Hold nothing back; a call that was cut off has no end."""
        return []


class RequiredCalls:
    """The parser of an answer that is a JSON list of calls. Linear: each character is looked at once."""

    def __init__(self) -> None:
        self._scan = JsonDepth()
        self._head = ""
        self._in_arguments = False
        self._num_calls = 0

    def feed(self, text: str) -> list[ParseEvent]:
        """Give calls out as they come: the name once the arguments begin, then the arguments' text."""
        events: list[ParseEvent] = []
        start = 0
        for at, depth in self._scan.braces(text):
            if not self._in_arguments and depth == 3:
                self._head += text[start:at]
                events.append(ToolCallBegin(self._num_calls, _name_of(self._head)))
                self._head, self._in_arguments, start = "", True, at
            elif self._in_arguments and depth == 2:
                events.append(ToolCallArguments(self._num_calls, text[start : at + 1]))
                events.append(ToolCallEnd(self._num_calls))
                self._num_calls, self._in_arguments, start = self._num_calls + 1, False, at + 1
        rest = text[start:]
        if rest and self._in_arguments:
            events.append(ToolCallArguments(self._num_calls, rest))
        elif rest:
            self._head = (self._head + rest)[-MAX_HEAD_CHARACTERS:]
        return events

    def finish(self) -> list[ParseEvent]:
        """Hold nothing back; a call that was cut off has no end."""
        return []


class JsonDepth:
    """Follows how deep JSON text is nested, however it is cut. `ended` once the outermost value was closed."""

    def __init__(self) -> None:
        self.depth = 0
        self.ended = False
        self._in_string = False
        self._escaped = False

    def braces(self, text: str) -> Iterator[tuple[int, int]]:
        """Give the place of each bracket that opens or closes, and the depth after it. Read it to its end."""
        for at, character in enumerate(text):
            if self._in_string:
                self._step_in_string(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
                yield at, self.depth
            elif character in "}]":
                self.depth -= 1
                self.ended = self.ended or self.depth <= 0
                yield at, self.depth

    def closings(self, text: str) -> Iterator[tuple[int, int]]:
        """Give what `braces` gives, up to the end of the outermost value."""
        for at, depth in self.braces(text):
            yield at, depth
            if self.ended:
                return

    def _step_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False


def _name_of(head: str) -> str:
    """Read the name out of a call's object up to its arguments: `[{"name": "f", "parameters": `."""
    start = head.find("{")
    try:
        name = json.loads(head[start:] + "null}")["name"]
    except (ValueError, KeyError, TypeError):
        name = ""
    return name if isinstance(name, str) else ""
