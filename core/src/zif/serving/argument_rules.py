"""The arguments of a call as rules of a grammar: one JSON object, or parameters that are written one by one."""

import json
import re
from collections.abc import Mapping
from typing import Any

from zif.errors import RequestError
from zif.parsing.formats import Format, Reads
from zif.parsing.parameters import parameter_types
from zif.serving.lark_rules import LarkRules
from zif.serving.tool_constraints import ANY_OBJECT, SPACING, parameters_of, with_references

_RAW = (frozenset({"string"}), frozenset({"string", "null"}))
"""Types of parameters that are written without quotes: whatever text stands there is a value of them."""

_OBJECT_KEYS = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
)
"""What a schema of parameters may say where they are written one by one."""

_BINDING = frozenset(
    {"enum", "const", "pattern", "format", "minLength", "maxLength", "not", "allOf", "if", "contentEncoding"}
)
"""Keys that a text must be checked for."""

_KEY = r"/[^<>\n]{1,128}/"


class ArgumentRules:
    """Writes the arguments of functions in the way of `form`'s family, into `rules`."""

    def __init__(self, form: Format, rules: LarkRules) -> None:
        self._form = form
        self._rules = rules

    def of(self, function: Mapping[str, Any], strict: bool) -> str:
        """Return the expression of a function's arguments: of its schema where `strict`, else any.

        Raises RequestError for a strict schema that the family's way of writing cannot be held to.
        """
        if self._form.written.parameter is None:
            return _json(parameters_of(function) if strict else ANY_OBJECT)
        return self._declared(function) if strict else self._any()

    def _declared(self, function: Mapping[str, Any]) -> str:
        """Return all parameters of a schema, in its order; those that are not required may be missing."""
        schema, where = parameters_of(function), f"tools: {function['name']!r} is strict, and its parameters"
        unknown = sorted(set(schema) - _OBJECT_KEYS)
        if unknown or schema.get("type") != "object":
            said = unknown[0] if unknown else "type"
            raise RequestError(
                f"{where} have {said!r}, which cannot be kept in the way this model writes calls; leave it or strict"
                " out"
            )
        required = schema.get("required") or []
        declared = schema.get("properties") or {}
        written = []
        for key in [*declared, *(key for key in required if key not in declared)]:
            if not self._can_be_written(key):
                raise RequestError(f"{where} have {key[:64]!r}, a name that this model's calls cannot have; rename it")
            one = self._parameter(schema, key, f"{where} {key!r}")
            written.append(one if key in required else f"({one})?")
        return " ".join(written)

    def _parameter(self, schema: Mapping[str, Any], key: str, where: str) -> str:
        before, between, after = self._pieces()
        return f"{self._rules.literal(before + key + between)} {self._value(schema, key, after, where)}"

    def _value(self, schema: Mapping[str, Any], key: str, after: str, where: str) -> str:
        types = parameter_types(schema, key)
        binding, found = _binding(schema, key)
        if types in _RAW and not binding:
            return self._up_to_end(after)
        if types != _RAW[0]:
            return f"{_json(_part(schema, key))} {self._rules.literal(after)}"
        choices = found.get("enum", [found["const"]] if "const" in found else None)
        if binding - {"enum", "const"} or not isinstance(choices, list) or not all(map(self._is_plain, choices)):
            raise RequestError(
                f"{where}: {', '.join(sorted(binding))} cannot be kept in the way this model writes texts; leave it or"
                " strict out"
            )
        return f"({' | '.join(map(json.dumps, choices))}) {self._rules.literal(after)}"

    def _any(self) -> str:
        before, between, after = self._pieces()
        literal = self._rules.literal
        return f"({literal(before)} {_KEY} {literal(between)} {self._up_to_end(after)})*"

    def _up_to_end(self, after: str) -> str:
        """Return free text up to the marker that the parser takes for its end, and what is written after that."""
        marker = self._value_end
        rest = after.partition(marker)[2]
        return " ".join([self._rules.up_to(marker), *([self._rules.literal(rest)] if rest else [])])

    @property
    def _value_end(self) -> str:
        values = next(state for state in self._form.states.values() if state.reads is Reads.VALUE)
        return next(iter(values.markers.targets))

    def _pieces(self) -> list[str]:
        return re.split(r"\$key|\$value", self._form.written.parameter or "")

    def _can_be_written(self, key: str) -> bool:
        return bool(re.fullmatch(_KEY.strip("/"), key)) and key == key.strip()

    def _is_plain(self, choice: object) -> bool:
        return isinstance(choice, str) and bool(choice) and choice.strip() == choice and self._value_end not in choice


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": SPACING})


def _part(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the schema of one property, by itself: what it refers to comes with it."""
    found = (schema.get("properties") or {}).get(key)
    if not isinstance(found, Mapping):
        return {}
    if '"$ref"' not in json.dumps(found):
        return dict(found)
    pointer = key.replace("~", "~0").replace("/", "~1")
    return {"$defs": {"all": with_references(schema, "#/$defs/all")}, "$ref": f"#/$defs/all/properties/{pointer}"}


def _binding(schema: Mapping[str, Any], key: str) -> tuple[frozenset[str], Mapping[str, Any]]:
    """Return the keys by which a property's schema, or a part of it, restricts texts, and the schema itself."""
    found = (schema.get("properties") or {}).get(key)
    found = _referred(found, schema)
    keys: set[str] = set()
    waiting, num_seen = [found], 0
    while waiting and num_seen < _MAX_PARTS:
        num_seen += 1
        part = _referred(waiting.pop(), schema)
        keys |= set(part) & _BINDING
        waiting += [entry for name in ("anyOf", "oneOf") if isinstance(part.get(name), list) for entry in part[name]]
    return frozenset(keys), found


_MAX_PARTS = 256


def _referred(found: object, schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references to definitions of the same schema. Raises RequestError for one that leads nowhere."""
    for _ in range(_MAX_PARTS):
        if not isinstance(found, Mapping):
            return {}
        reference = found.get("$ref")
        if not isinstance(reference, str):
            return found
        marks = reference.split("/")
        definitions = schema.get(marks[1]) if len(marks) == 3 and marks[0] == "#" else None
        if not isinstance(definitions, Mapping) or marks[2] not in definitions:
            raise RequestError(f"tools: the reference {reference[:128]!r} leads to no definition of its schema")
        found = {**definitions[marks[2]], **{name: value for name, value in found.items() if name != "$ref"}}
    raise RequestError("tools: a schema refers to itself without end")
