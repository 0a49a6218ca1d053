"""Values of parameters that are written one by one, as JSON: by the tool's JSON schema where it says what they are."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from zif.parsing.json_values import MAX_DEPTH, is_json

MAX_TYPED_CHARACTERS = 2**16
"""A value that may be other than a string waits for its end, up to here; what is longer is a string."""

_MAX_SCHEMAS = 256
_MAX_ALTERNATIVES = 128
_ANY = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_STRING = frozenset({"string"})
_SPOKEN = {"True": "true", "False": "false", "None": "null"}
"""Templates print values as Python does, so models write them so."""


class ParameterValue:
    """One value as it arrives. The pieces that `add` and `end` return make one JSON value, however it was cut."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._is_string = types <= _STRING
        self._begun = False
        self._held: list[str] = []
        self._num_held = 0

    def add(self, text: str) -> str:
        """Take more of the value; return the JSON that is certain."""
        if not self._is_string:
            self._held.append(text)
            self._num_held += len(text)
            if self._num_held <= MAX_TYPED_CHARACTERS:
                return ""
            self._is_string, text = True, "".join(self._held)
        begin = "" if self._begun else '"'
        self._begun = True
        return begin + _escaped(text)

    def end(self) -> str:
        """Return the rest of the JSON."""
        if self._is_string:
            return '"' if self._begun else '""'
        text = "".join(self._held)
        value = _SPOKEN.get(text.strip(), text.strip())
        # One level is the object of the arguments itself.
        if is_json(value, MAX_DEPTH - 1) and _type_of(value) & self._types:
            return value
        return f'"{_escaped(text)}"'


def parameter_types(schema: object, key: str) -> frozenset[str]:
    """Return the JSON types that a tool's schema allows for a parameter; a string where it says nothing of it."""
    if not isinstance(schema, Mapping):
        return _STRING
    properties = schema.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    if not isinstance(found, Mapping):
        return _STRING
    return frozenset(_types(found, schema)) & _ANY or _ANY


def _types(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[str]:
    waiting: list[object] = [schema]
    seen: set[int] = set()
    # Schemas come with requests: alternatives that refer to each other would never end.
    for _ in range(_MAX_SCHEMAS):
        if not waiting:
            return
        found = waiting.pop()
        if not isinstance(found, Mapping):
            continue
        if isinstance(found.get("$ref"), str):
            found = _resolved(found["$ref"], root)
        if id(found) in seen:
            continue
        seen.add(id(found))
        declared = found.get("type")
        yield from (name for name in (declared if isinstance(declared, list) else [declared]) if isinstance(name, str))
        if declared is None:
            values = (type(one)() if isinstance(one, dict | list | str) else one for one in _list(found.get("enum")))
            yield from (name for value in values for name in _type_of(json.dumps(value)))
        waiting += _list(found.get("anyOf")) + _list(found.get("oneOf"))


def _resolved(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a reference to a definition of the same schema; one that leads elsewhere allows anything."""
    marks = reference.split("/")
    if len(marks) != 3 or marks[0] != "#" or marks[1] not in ("$defs", "definitions"):
        return {}
    definitions = root.get(marks[1])
    found = definitions.get(marks[2]) if isinstance(definitions, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value[:_MAX_ALTERNATIVES] if isinstance(value, list) else []


def _type_of(value: str) -> frozenset[str]:
    """Return the types that a valid JSON text has: an integer is a number too."""
    by_begin = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    name = by_begin.get(value[:1])
    if name is not None:
        return frozenset({name})
    return frozenset({"number"}) if set(value) & set(".eE") else frozenset({"number", "integer"})


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
