"""A strict schema of parameters that are written one by one, checked: what each may be, and what restricts its text.

Such parameters have no object around them that a grammar of JSON could hold, so their schema is taken apart here. It
came with a request: what has another shape than a schema is refused by name, and looking at it has a bound.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zif.errors import RequestError
from zif.parsing.parameters import parameter_types
from zif.serving.tools.schemas import with_references

MAX_PARAMETERS = 256
"""Of one function."""

MAX_PARTS = 128
"""A parameter's alternatives, and what they refer to one after another."""

MAX_STEPS = 1 << 14
"""Parts and listed values that are looked at for one grammar."""

_OBJECT_KEYS = frozenset(
    {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
)
"""What a schema of parameters may say where they are written one by one."""

_RESTRICTING = frozenset(
    {"enum", "const", "pattern", "format", "minLength", "maxLength", "not", "allOf", "if", "contentEncoding"}
)
"""Keys that a text must be checked for."""

_DEFINITIONS = ("$defs", "definitions")
_ANYTHING: Mapping[str, Any] = {}


class SchemaSteps:
    """Counts what is looked at for one grammar."""

    def __init__(self) -> None:
        self._num_left = MAX_STEPS

    def take(self, num_steps: int, where: str) -> None:
        """Count steps. Raises RequestError beyond MAX_STEPS."""
        self._num_left -= num_steps
        if self._num_left < 0:
            raise RequestError(
                f"{where}: the strict schemas up to here have more than {MAX_STEPS} alternatives and listed values;"
                " simplify them, or leave strict out"
            )


@dataclass(frozen=True, slots=True)
class Restrictions:
    """By which keys a schema restricts texts. `choices` are all that are left, where one list says all of it."""

    keys: frozenset[str]
    choices: list[Any] | None


@dataclass(frozen=True, slots=True)
class _Part:
    """A schema with what it refers to, one after another, and what these say. `num_values` are those that they list."""

    layers: list[Mapping[str, Any]]
    alternatives: list[object]
    keys: frozenset[str]
    num_values: int


class DeclaredParameters:
    """The parameters of one function. `schema` is theirs, without notes; `steps` are those of the grammar."""

    def __init__(self, function: str, schema: Mapping[str, Any], steps: SchemaSteps) -> None:
        """Raises RequestError for a schema that is none, or that parameters one by one cannot be held to."""
        self._function = function
        self._where = f"tools: {function!r} is strict, and its parameters"
        self._schema = schema
        self._steps = steps
        self._known: dict[int, _Part] = {}  # by the identity of the schema's own objects: many parameters share them
        unknown = sorted(set(schema) - _OBJECT_KEYS)
        if unknown or schema.get("type") != "object":
            said = unknown[0][:64] if unknown else "type"
            raise RequestError(
                f"{self._where} have {said!r}, which cannot be kept in the way this model writes calls; leave it or"
                " strict out"
            )
        self._properties = self._schemas_by_name("properties")
        for name in _DEFINITIONS:
            self._schemas_by_name(name)
        self.required = frozenset(self._required())
        self.keys = list(dict.fromkeys([*self._properties, *self._required()]))
        if len(self.keys) > MAX_PARAMETERS:
            raise RequestError(
                f"{self._where} are {len(self.keys)}; at most {MAX_PARAMETERS} can be kept in the way this model writes"
                " calls; leave some or strict out"
            )

    def where(self, key: str) -> str:
        """Say which parameter it is, for an error."""
        return f"tools: {self._function!r} is strict, and its parameter {key[:64]!r}"

    def text(self, key: str) -> str:
        """Return what a parameter is declared as: two with the same text are alike."""
        return json.dumps(self._properties.get(key, True))

    def types(self, key: str) -> frozenset[str]:
        """Return the JSON types that a parameter may have, as the parser of answers takes them."""
        return parameter_types(self._schema, key)

    def restrictions(self, key: str) -> Restrictions:
        """Return what restricts the text of a parameter. Raises RequestError for what is no schema."""
        where = self.where(key)
        parts = list(self._parts(key, where))
        choices = [
            layer["enum"] if name == "enum" else [layer["const"]]
            for layer in parts[0].layers
            for name in ("enum", "const")
            if name in layer
        ]
        is_all = len(choices) == 1 and isinstance(choices[0], list) and not any(part.keys for part in parts[1:])
        return Restrictions(frozenset[str]().union(*(part.keys for part in parts)), choices[0] if is_all else None)

    def part(self, key: str) -> dict[str, Any]:
        """Return the schema of one parameter, by itself: what it refers to comes with it."""
        found = self._declared(key)
        needed = self._needed(found)
        if needed is not None:
            return {**found, **needed}
        pointer = key.replace("~", "~0").replace("/", "~1")
        root = with_references(self._schema, "#/$defs/all")
        return {"$defs": {"all": root}, "$ref": f"#/$defs/all/properties/{pointer}"}

    def _declared(self, key: str) -> Mapping[str, Any]:
        return self._checked(self._properties.get(key, True), self.where(key))

    def _parts(self, key: str, where: str) -> Iterator[_Part]:
        """Give a parameter's schema, then all its alternatives."""
        waiting: list[object] = [self._properties.get(key, True)]
        seen: set[tuple[int, ...]] = set()
        while waiting:
            part = self._part(waiting.pop(), where)
            identity = tuple(map(id, part.layers))
            if identity in seen:
                continue
            seen.add(identity)
            self._steps.take(len(part.layers) + len(part.alternatives) + part.num_values, where)
            if len(seen) + len(part.alternatives) > MAX_PARTS:
                raise RequestError(f"{where} has more than {MAX_PARTS} alternatives; leave some or strict out")
            waiting += part.alternatives
            yield part

    def _part(self, found: object, where: str) -> _Part:
        known = self._known.get(id(found))
        if known is None:
            layers = self._layers(found, where)
            known = self._known[id(found)] = _Part(
                layers,
                [entry for layer in layers for entry in self._alternatives(layer, where)],
                frozenset(name for layer in layers for name in _RESTRICTING if name in layer),
                sum(len(layer["enum"]) for layer in layers if isinstance(layer.get("enum"), list)),
            )
        return known

    def _layers(self, found: object, where: str) -> list[Mapping[str, Any]]:
        """Return a schema and what it refers to, one after another. Raises RequestError for one without an end."""
        layers = [self._checked(found, where)]
        while (reference := layers[-1].get("$ref")) is not None:
            if len(layers) > MAX_PARTS:
                raise RequestError(f"{where} refers to {str(reference)[:128]!r} without end; mend the schema")
            layers.append(self._checked(self._definition(reference, where), where))
        return layers

    def _definition(self, reference: object, where: str) -> object:
        marks = reference.split("/") if isinstance(reference, str) else []
        definitions = self._schema.get(marks[1]) if len(marks) == 3 and marks[0] == "#" else None
        if not isinstance(definitions, Mapping) or marks[2] not in definitions:
            raise RequestError(f"{where}: the reference {str(reference)[:128]!r} leads to no definition of its schema")
        return definitions[marks[2]]

    def _alternatives(self, layer: Mapping[str, Any], where: str) -> list[object]:
        lists = [layer[name] for name in ("anyOf", "oneOf") if name in layer]
        if not all(isinstance(entries, list) for entries in lists):
            raise RequestError(f"{where} has an anyOf or oneOf that is no list of schemas; mend it")
        return [entry for entries in lists for entry in entries]

    def _needed(self, found: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
        """Return the definitions that a schema refers to, also through others; None where it refers elsewhere."""
        needed: dict[str, dict[str, Any]] = {}
        waiting: list[Any] = [found]
        while waiting:
            for reference in _references(waiting.pop()):
                at, container, name = [*reference.split("/"), "", ""][:3]
                definitions = self._schema.get(container) if at == "#" and container in _DEFINITIONS else None
                if not isinstance(definitions, Mapping) or name not in definitions:
                    return None
                if name not in needed.setdefault(container, {}):
                    needed[container][name] = definitions[name]
                    waiting.append(definitions[name])
        return needed

    def _schemas_by_name(self, name: str) -> Mapping[str, Any]:
        found = self._schema.get(name)
        if found is not None and not isinstance(found, Mapping):
            raise RequestError(f"{self._where} have {name!r}, which must be an object of schemas by name; mend it")
        return found or {}

    def _required(self) -> list[str]:
        found = self._schema.get("required")
        if found is None:
            return []
        if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
            raise RequestError(f"{self._where} have 'required', which must be a list of names; mend it")
        return found

    def _checked(self, found: object, where: str) -> Mapping[str, Any]:
        if found is True:
            return _ANYTHING
        if not isinstance(found, Mapping):
            raise RequestError(
                f"{where} is or refers to {str(found)[:64]!r}, where a schema must stand; give an object"
            )
        return found


def _references(value: object) -> Iterator[str]:
    """Give all references within a schema."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Mapping):
            if isinstance(reference := found.get("$ref"), str):
                yield reference
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
