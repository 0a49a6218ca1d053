"""The fixed strings that divide an answer, found in text that arrives in pieces.

The search is one regular expression of literals, so its time is linear in the text. What it finds does not depend on
how the text was cut, because no marker of a set contains another: a marker that may still be growing can then never be
overtaken by one that is complete.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """The place where the text before a marker ends, and the marker there; None where none has come yet."""

    start: int
    marker: str | None


class Markers:
    """A set of markers and the state that each leads to. Those of `kept` stay in the text for the state that follows.

    Raises ValueError for an empty marker and for one that contains another.
    """

    def __init__(self, consumed: Mapping[str, str], kept: Mapping[str, str] | None = None) -> None:
        self.targets = {**consumed, **(kept or {})}
        self._kept = frozenset(kept or ())
        _check(self.targets, len(consumed) + len(self._kept))
        self._pattern = re.compile("|".join(map(re.escape, self.targets))) if self.targets else None
        self._prefixes = frozenset(marker[:size] for marker in self.targets for size in range(1, len(marker)))
        self._longest = max(map(len, self._prefixes), default=0)

    def __bool__(self) -> bool:
        return bool(self.targets)

    def length_taken(self, marker: str) -> int:
        """Return how much of the text a marker takes away."""
        return 0 if marker in self._kept else len(marker)

    def find(self, text: str, start: int, stop: int, is_final: bool) -> Found:
        """Find the first marker that begins in text[start:stop]. Up to `Found.start` there is none, nor a part of one.

        With `is_final` no text follows, and parts of markers are text.
        """
        if self._pattern is None:
            return Found(stop, None)
        match = self._pattern.search(text, start, stop + self._longest + 1)
        if match is not None and match.start() < stop:
            return Found(match.start(), match.group())
        return Found(stop if is_final else min(stop, self._begin_of_part(text, start)), None)

    def match(self, text: str, at: int) -> str | None:
        """Return the marker that stands at `at`."""
        match = self._pattern.match(text, at) if self._pattern else None
        return match.group() if match else None

    def may_grow(self, text: str, at: int) -> bool:
        """Say whether all text from `at` on is the beginning of a marker."""
        return text[at : at + self._longest + 1] in self._prefixes

    def _begin_of_part(self, text: str, start: int) -> int:
        """Return where the longest end of text[start:] begins that may grow to a marker."""
        first = max(start, len(text) - self._longest)
        return next((at for at in range(first, len(text)) if text[at:] in self._prefixes), len(text))


def _check(markers: Mapping[str, str], num_given: int) -> None:
    if len(markers) < num_given:
        raise ValueError("a marker is listed twice, as one that is taken and one that is kept")
    for marker in markers:
        if not marker:
            raise ValueError("an empty marker stands everywhere; give it a text")
        longer = next((other for other in markers if other != marker and marker in other), None)
        if longer is not None:
            raise ValueError(f"marker {longer!r} contains marker {marker!r}, so where it ends would depend on cuts")
