"""Looks over a JSON body before it is decoded: nesting, number of values, keys that are given twice.

Works in slices, so that the event loop can serve others between them whatever the body is, and costs no memory but the
keys that it has seen. It does not check that the body is valid JSON: the decoder does so afterwards, and the scan is
exact for what the decoder accepts.
"""

import contextlib
import re
from collections.abc import Generator, Iterator

import msgspec

_SLICE_BYTES = 2**16
_SLICE_TOKENS = 2**12
_TOKEN = re.compile(rb'[\[\]{}"]')
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_QUOTE, _BACKSLASH, _BRACE = b'"\\{'
_SHOWN_KEY_BYTES = 64


class JsonLimitError(ValueError):
    """A body is too deep, has too many values, or gives a key twice. `key` is the key at fault."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class JsonScan:
    """One body being scanned. `top_level_keys` is complete when the scan has ended, and empty for no object."""

    def __init__(self, body: bytes, max_depth: int, max_values: int) -> None:
        self._body = body
        self._max_depth = max_depth
        self._max_values = max_values
        self._num_values = 0
        # The keys of each open object, None for an open array.
        self._open: list[set[bytes] | None] = []
        self._key_expected = False
        self.top_level_keys: set[bytes] = set()

    def slices(self) -> Iterator[None]:
        """Scan, yielding after each slice. Raises `JsonLimitError`."""
        body, size, position, num_tokens = self._body, len(self._body), 0, 0
        while position < size:
            token = _TOKEN.search(body, position, position + _SLICE_BYTES)
            begin = min(position + _SLICE_BYTES, size) if token is None else token.start()
            self._commas(body.count(b",", position, begin))
            position = begin
            if token is None:
                yield
                continue
            position += 1
            if body[begin] == _QUOTE:
                position = body.find(b'"', position, position + _SLICE_BYTES)
                if position < 0 or body[position - 1] == _BACKSLASH:
                    position = yield from self._string_end(begin + 1)
                if self._key_expected:
                    self._key(body[begin + 1 : position])
                position += 1
            elif not self._bracket(body[begin]):
                return
            num_tokens += 1
            if num_tokens % _SLICE_TOKENS == 0:
                yield

    def _string_end(self, position: int) -> Generator[None, None, int]:
        """Return where the string that `position` is in ends: the index of its quote, or the body's size."""
        body, size = self._body, len(self._body)
        while position < size:
            rest = _STRING_REST.match(body, position, position + _SLICE_BYTES)
            end = position if rest is None else rest.end()
            if end < size and body[end] == _QUOTE:
                return end
            if end == position:
                return size  # a backslash is the last byte of the body
            position = end
            yield
        return size

    def _commas(self, number: int) -> None:
        """Take the commas since the last bracket or string. In an object a key comes after one."""
        if number:
            self._count(number)
            self._key_expected = bool(self._open) and self._open[-1] is not None

    def _bracket(self, bracket: int) -> bool:
        """Take a bracket. Return False where the rest cannot be valid JSON."""
        self._key_expected = False
        if bracket in b"]}":
            if self._open:
                self._open.pop()
                return True
            return False
        self._count(1)
        if len(self._open) == self._max_depth:
            raise JsonLimitError(f"the body is nested deeper than {self._max_depth} levels; flatten it")
        self._key_expected = bracket == _BRACE
        self._open.append(set() if self._key_expected else None)
        return True

    def _key(self, key: bytes) -> None:
        if b"\\" in key:
            # "mod\u0065l" is the same key as "model".
            with contextlib.suppress(msgspec.DecodeError):
                key = msgspec.json.decode(b'"' + key + b'"', type=str).encode("utf-8")
        self._count(1)
        self._key_expected = False
        seen = self._open[-1]
        assert seen is not None, "keys are expected in objects only"
        if key in seen:
            name = key[:_SHOWN_KEY_BYTES].decode("utf-8", errors="replace")
            raise JsonLimitError(f"the body gives the key {name!r} twice in one object; give it once", name)
        seen.add(key)
        if len(self._open) == 1:
            self.top_level_keys = seen

    def _count(self, number: int) -> None:
        self._num_values += number
        if self._num_values > self._max_values:
            raise JsonLimitError(f"the body has more than {self._max_values} values and keys; split the request")
