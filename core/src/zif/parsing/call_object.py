"""A call written as one JSON object, `{"name": "f", "arguments": {...}}`, read key by key as it arrives."""

import json
from collections.abc import Container
from enum import Enum

from zif.parsing.json_values import JsonScanner, skip_space

MAX_STRING_CHARACTERS = 1024
"""A key, or the name of a tool, as written."""

NAME_KEY = "name"
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
OTHER_KEYS = frozenset({"type", "id", "index"})
"""What else calls have; other keys say that a bare object is no call."""


class _Expects(Enum):
    OBJECT = "{"
    KEY_OR_CLOSE = "a key, or the end of an empty object"
    KEY = "a key"
    COLON = ":"
    VALUE = "a value"
    COMMA_OR_CLOSE = "a comma, or the end"


class _Role(Enum):
    KEY = "a key"
    NAME = "the tool's name"
    ARGUMENTS = "the arguments"
    OTHER = "a value of no interest"


class CallObject:
    """Follows one object. `name` is there once it was read, `ready` once it is certain that this is a call.

    `known` marks a bare object: it is a call only if it names one of these and has the keys of a call alone. The first
    name and the first arguments count. `failed` says that the text cannot be a call, or not a whole one any more.
    """

    def __init__(self, known: Container[str] | None = None) -> None:
        self.name: str | None = None
        self.done = False
        self.failed = False
        self._known = known
        self._expects = _Expects.OBJECT
        self._role = _Role.OTHER
        self._scanner: JsonScanner | None = None
        self._string = ""
        self._has_arguments = False
        self._arguments: list[str] = []

    @property
    def ready(self) -> bool:
        """Say whether a call has certainly begun."""
        return self.name is not None and (self._known is None or self._has_arguments)

    def take_arguments(self) -> str:
        """Return the arguments' text since the last time. An object that ends without any has none: `{}`."""
        if self.done and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        taken, self._arguments = "".join(self._arguments), []
        return taken

    def read(self, text: str, start: int, stop: int) -> int:
        """Take text[start:stop] up to the end, the first wrong character, or where `ready` becomes true."""
        at, was_ready = start, self.ready
        while at < stop and not self.done and not self.failed and self.ready is was_ready:
            if self._scanner is not None:
                at = self._read_value(self._scanner, text, at, stop)
            else:
                blank_end = skip_space(text, at, stop)
                at = blank_end if blank_end > at else self._read_mark(text[at], at)
        return at

    def _read_mark(self, character: str, at: int) -> int:
        expects = self._expects
        if expects is _Expects.VALUE:
            return self._begin(character, self._role, at)
        if character == '"' and expects in (_Expects.KEY, _Expects.KEY_OR_CLOSE):
            return self._begin(character, _Role.KEY, at)
        if character == "}" and expects in (_Expects.KEY_OR_CLOSE, _Expects.COMMA_OR_CLOSE):
            self.done = True
            return at + 1
        following = {
            (_Expects.OBJECT, "{"): _Expects.KEY_OR_CLOSE,
            (_Expects.COLON, ":"): _Expects.VALUE,
            (_Expects.COMMA_OR_CLOSE, ","): _Expects.KEY,
        }.get((expects, character))
        if following is None:
            self.failed = True
            return at
        self._expects = following
        return at + 1

    def _begin(self, character: str, role: _Role, at: int) -> int:
        first = {_Role.NAME: '"', _Role.ARGUMENTS: "{"}.get(role)
        if first is not None and character != first:
            self.failed = True
            return at
        self._role, self._scanner, self._string = role, JsonScanner(), ""
        self._has_arguments = self._has_arguments or role is _Role.ARGUMENTS
        return at

    def _read_value(self, scanner: JsonScanner, text: str, at: int, stop: int) -> int:
        is_string = self._role in (_Role.KEY, _Role.NAME)
        if is_string:
            stop = min(stop, at + MAX_STRING_CHARACTERS - len(self._string))
        end = scanner.scan(text, at, stop)
        if is_string:
            self._string += text[at:end]
        elif self._role is _Role.ARGUMENTS:
            self._arguments.append(text[at:end])
        too_long = is_string and len(self._string) >= MAX_STRING_CHARACTERS
        self.failed = scanner.failed or (too_long and not scanner.done)
        if scanner.done:
            self._end()
        return end

    def _end(self) -> None:
        self._scanner = None
        self._expects = _Expects.COLON if self._role is _Role.KEY else _Expects.COMMA_OR_CLOSE
        if self._role is _Role.KEY:
            self._role = self._role_of(json.loads(self._string))
        elif self._role is _Role.NAME:
            self.name = json.loads(self._string)
            self.failed = self._known is not None and self.name not in self._known

    def _role_of(self, key: str) -> _Role:
        if key == NAME_KEY and self.name is None:
            return _Role.NAME
        if key in ARGUMENT_KEYS and not self._has_arguments:
            return _Role.ARGUMENTS
        self.failed = self._known is not None and key not in OTHER_KEYS
        return _Role.OTHER
