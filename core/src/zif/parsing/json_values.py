"""One JSON value (RFC 8259), checked as it arrives.

Not a decoder: it says where the value ends and whether it is valid, and keeps no more of it than the number at hand.
Numbers and nesting are bounded, so that what passes here can be decoded by any reader without harm.
"""

import json
import re
from enum import Enum

MAX_DEPTH = 64
"""Objects and lists within one another. Decoders recurse; arguments of tools have a handful of levels."""

MAX_NUMBER_CHARACTERS = 1024
"""Python refuses to convert integers of more than 4,300 digits."""

SPACE = " \t\n\r"
_SPACES = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[A-Za-z0-9+.\-]*")
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSERS = {"{": "}", "[": "]"}
_ESCAPES = frozenset('"\\/bfnrt')


class _Expects(Enum):
    VALUE = "a value"
    ITEM_OR_CLOSE = "a value, or the end of an empty list"
    KEY = "a key"
    KEY_OR_CLOSE = "a key, or the end of an empty object"
    COLON = "a colon"
    COMMA_OR_CLOSE = "a comma, or the end of the object or list"
    STRING = "more of a string"
    ESCAPE = "what follows a backslash"
    HEX = "a digit of a \\u escape"
    WORD = "more of a number or of true, false, null"


_MAY_CLOSE = frozenset({_Expects.COMMA_OR_CLOSE, _Expects.KEY_OR_CLOSE, _Expects.ITEM_OR_CLOSE})


def skip_space(text: str, start: int, stop: int) -> int:
    """Return where the blanks from `start` on end, at most `stop`."""
    match = _SPACES.match(text, start, stop)
    return match.end() if match else start


class JsonScanner:
    """Follows one value. `done` once it is complete, `failed` once it cannot become valid JSON any more."""

    def __init__(self, max_depth: int = MAX_DEPTH) -> None:
        self.done = False
        self.failed = False
        self._max_depth = max_depth
        self._closers: list[str] = []
        self._expects = _Expects.VALUE
        self._is_key = False
        self._num_hex = 0
        self._word = ""

    def scan(self, text: str, start: int, stop: int) -> int:
        """Take text[start:stop] up to the value's end, or to the character that is wrong; return where that is."""
        at = start
        while at < stop and not self.done and not self.failed:
            if self._expects is _Expects.STRING:
                at = self._read_string(text, at, stop)
            elif self._expects is _Expects.WORD:
                at = self._read_word(text, at, stop)
            elif self._expects in (_Expects.ESCAPE, _Expects.HEX):
                at = self._read_escape(text, at)
            else:
                blank_end = skip_space(text, at, stop)
                at = blank_end if blank_end > at else self._read_structure(text, at)
        return at

    def _read_string(self, text: str, at: int, stop: int) -> int:
        match = _PLAIN.match(text, at, stop)
        if match is not None and match.end() > at:
            return match.end()
        if text[at] == '"':
            if self._is_key:
                self._is_key, self._expects = False, _Expects.COLON
            else:
                self._end_value()
            return at + 1
        return self._expect(text[at] == "\\", _Expects.ESCAPE, at)

    def _read_escape(self, text: str, at: int) -> int:
        character = text[at]
        if self._expects is _Expects.HEX:
            self._num_hex -= 1
            return self._expect(character in _HEX, _Expects.HEX if self._num_hex else _Expects.STRING, at)
        if character == "u":
            self._num_hex = 4
            return self._expect(True, _Expects.HEX, at)
        return self._expect(character in _ESCAPES, _Expects.STRING, at)

    def _read_word(self, text: str, at: int, stop: int) -> int:
        match = _WORD.match(text, at, min(stop, at + MAX_NUMBER_CHARACTERS - len(self._word)))
        end = match.end() if match else at
        self._word += text[at:end]
        if len(self._word) >= MAX_NUMBER_CHARACTERS:
            self.failed = True
        elif end == at:
            word, self._word = self._word, ""
            self.failed = not _is_word(word)
            self._end_value()
        return end

    def _read_structure(self, text: str, at: int) -> int:
        character, expects = text[at], self._expects
        if expects is _Expects.COLON:
            return self._expect(character == ":", _Expects.VALUE, at)
        if expects is _Expects.COMMA_OR_CLOSE and character == ",":
            return self._expect(True, _Expects.KEY if self._closers[-1] == "}" else _Expects.VALUE, at)
        if expects in _MAY_CLOSE and character == self._closers[-1]:
            self._closers.pop()
            self._end_value()
            return at + 1
        if expects in (_Expects.KEY, _Expects.KEY_OR_CLOSE):
            self._is_key = True
            return self._expect(character == '"', _Expects.STRING, at)
        if expects is _Expects.COMMA_OR_CLOSE:
            return self._expect(False, expects, at)
        return self._begin_value(character, at)

    def _begin_value(self, character: str, at: int) -> int:
        if character in _CLOSERS:
            self._closers.append(_CLOSERS[character])
            opened = _Expects.KEY_OR_CLOSE if character == "{" else _Expects.ITEM_OR_CLOSE
            return self._expect(len(self._closers) <= self._max_depth, opened, at)
        if character == '"':
            return self._expect(True, _Expects.STRING, at)
        begins_word = _WORD.match(character, 0)
        if begins_word is None or not begins_word.end():
            return self._expect(False, self._expects, at)
        self._expects = _Expects.WORD
        return at

    def _end_value(self) -> None:
        self.done = not self._closers and not self.failed
        self._expects = _Expects.COMMA_OR_CLOSE

    def _expect(self, is_right: bool, following: _Expects, at: int) -> int:
        if not is_right:
            self.failed = True
            return at
        self._expects = following
        return at + 1


def is_json(text: str, max_depth: int = MAX_DEPTH) -> bool:
    """Say whether a text is one JSON value."""
    scanner = JsonScanner(max_depth)
    # A number ends where something else follows; a blank is something else.
    padded = text + " "
    end = scanner.scan(padded, 0, len(padded))
    return scanner.done and skip_space(padded, end, len(padded)) == len(padded)


def _is_word(word: str) -> bool:
    if word in ("true", "false", "null"):
        return True
    if word[:1] not in "-0123456789" or word.endswith("Infinity"):
        return False
    try:
        json.loads(word)
    except ValueError:
        return False
    return True
