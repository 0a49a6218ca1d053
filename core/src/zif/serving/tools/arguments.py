"""The arguments of a call as rules of a grammar: one JSON object, or parameters that are written one by one."""

import json
import re
from collections.abc import Mapping
from typing import Any

from zif.errors import RequestError
from zif.parsing.formats import Format, Reads
from zif.serving.tools.forced import SPACING
from zif.serving.tools.lark import LarkRules
from zif.serving.tools.parameters import DeclaredParameters, SchemaSteps
from zif.serving.tools.schemas import ANY_OBJECT, ToolSchemas

_RAW = (frozenset({"string"}), frozenset({"string", "null"}))
"""Types of parameters that are written without quotes: whatever text stands there is a value of them."""

_KEY = r"/[^<>\n]{1,128}/"

_MAX_INLINE = 256
"""Characters of a value's expression that may stand more than once; a longer one is a rule."""


class ArgumentRules:
    """Writes the arguments of functions in the way of `form`'s family, into `rules`."""

    def __init__(self, form: Format, rules: LarkRules) -> None:
        self._form = form
        self._rules = rules
        self._schemas = ToolSchemas()
        self._steps = SchemaSteps()

    def of(self, function: Mapping[str, Any], strict: bool) -> str:
        """Return the expression of a function's arguments: of its schema where `strict`, else any.

        Raises RequestError for a strict schema that the family's way of writing cannot be held to, or that is longer
        than a grammar.
        """
        if self._form.written.parameter is None:
            return _json(self._schemas.parameters(function) if strict else ANY_OBJECT)
        return self._declared(function) if strict else self._any()

    def _declared(self, function: Mapping[str, Any]) -> str:
        """Return all parameters of a schema, in its order; those that are not required may be missing."""
        declared = DeclaredParameters(function["name"], self._schemas.parameters(function), self._steps)
        before, between, after = self._pieces()
        values: dict[str, str] = {}
        written = []
        for key in declared.keys:
            if not self._can_be_written(key):
                raise RequestError(
                    f"{declared.where(key)}, a name that this model's calls cannot have, must be renamed"
                )
            # Parameters that are declared alike share their value: a reference may stand for all of a long schema.
            if (text := declared.text(key)) not in values:
                values[text] = self._rules.short(self._value(declared, key, after), _MAX_INLINE)
            one = f"{self._rules.literal(before + key + between)} {values[text]}"
            written.append(one if key in declared.required else f"({one})?")
        return " ".join(written)

    def _value(self, declared: DeclaredParameters, key: str, after: str) -> str:
        restricting, types = declared.restrictions(key), declared.types(key)
        if types in _RAW and not restricting.keys:
            return self._up_to_end(after)
        if types != _RAW[0]:
            return f"{_json(declared.part(key))} {self._rules.literal(after)}"
        choices = restricting.choices
        if restricting.keys - {"enum", "const"} or not choices or not all(map(self._is_plain, choices)):
            raise RequestError(
                f"{declared.where(key)}: {', '.join(sorted(restricting.keys))} cannot be kept in the way this model"
                " writes texts; leave it or strict out"
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
