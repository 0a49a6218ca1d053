"""Schemas of functions as grammars take them: without notes, within the length that a grammar may have.

Schemas come with requests, and are read where all requests are served. So what is left of them is counted while it is
read, and one that no grammar has room for is refused before the rest of it is looked at.
"""

from collections.abc import Mapping
from typing import Any

from zif.contract.structured import MAX_GRAMMAR_CHARACTERS
from zif.errors import RequestError

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_NOTES = frozenset({"description", "title", "examples", "default", "$comment"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keys of a schema whose values are schemas by names, which may be anything."""

_VALUES = frozenset({"const", "enum"})
"""Keys of a schema whose values are no schemas."""


class ToolSchemas:
    """Reads the schemas of one grammar's functions, which share its length."""

    def __init__(self) -> None:
        self._num_left = MAX_GRAMMAR_CHARACTERS

    def parameters(self, function: Mapping[str, Any]) -> dict[str, Any]:
        """Return a function's schema without what only explains; one without parameters takes an empty object.

        Raises RequestError when it and those before it have more characters than a grammar may have.
        """
        parameters = function.get("parameters")
        if not parameters:
            return {**ANY_OBJECT, "additionalProperties": False}
        try:
            return {**ANY_OBJECT, **self._without_notes(parameters)}
        except _NoRoomError:
            raise RequestError(
                f"tools: without descriptions, the schemas that calls are held to have more than"
                f" {MAX_GRAMMAR_CHARACTERS} characters, which is reached in that of {function['name']!r}; hold calls to"
                " fewer tools (strict, tool_choice), or simplify their schemas"
            ) from None

    def _without_notes(self, schema: Any) -> Any:
        """Return a schema without the notes in it, which are most of its characters and nothing to a grammar."""
        if isinstance(schema, list):
            self._count(2 * len(schema))
            return [self._without_notes(entry) for entry in schema]
        if not isinstance(schema, dict):
            return self._whole(schema)
        self._count(2)
        kept: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _NOTES:
                continue
            self._count(len(key) + 4)
            if key in _BY_NAME and isinstance(value, dict):
                kept[key] = self._by_name(value)
            else:
                kept[key] = self._whole(value) if key in _VALUES else self._without_notes(value)
        return kept

    def _by_name(self, schemas: Mapping[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, schema in schemas.items():
            self._count(len(name) + 4)
            kept[name] = self._without_notes(schema)
        return kept

    def _whole(self, value: Any) -> Any:
        """Count a value that stays as it is."""
        if isinstance(value, list):
            self._count(2 * len(value))
            for entry in value:
                self._whole(entry)
        elif isinstance(value, dict):
            for key, entry in value.items():
                self._count(len(key) + 4)
                self._whole(entry)
        else:
            self._count(len(value) + 2 if isinstance(value, str) else 1)
        return value

    def _count(self, num_characters: int) -> None:
        """Count what JSON has at least. Raises _NoRoomError."""
        self._num_left -= num_characters
        if self._num_left < 0:
            raise _NoRoomError


class _NoRoomError(Exception):
    """What was read is longer than a grammar."""


def with_references(value: Any, root: str) -> Any:
    """Return a schema whose references to itself and its parts lead to `root`."""
    if isinstance(value, dict):
        return {
            key: root + entry[1:]
            if key == "$ref" and isinstance(entry, str) and entry.startswith("#")
            else with_references(entry, root)
            for key, entry in value.items()
        }
    return [with_references(entry, root) for entry in value] if isinstance(value, list) else value
