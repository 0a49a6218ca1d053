"""Find stop strings in text that arrives in pieces.

Not a tokenizer: stop strings may begin and end within tokens. The engine keeps one `StopStrings` per sequence.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop string stands in the text at hand: text[start:end]."""

    stop: str
    start: int
    end: int


class StopStrings:
    """Let text through until one of `stops` is complete.

    The match that ends first counts, the longest of those that end together; so the result does not depend on how the
    text is cut into pieces. Text that may be the beginning of a stop string is held back, unless `include` asks for
    the stop string as part of the text. `matched` is the stop string found.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        assert all(stops), f"stops={stops!r}: an empty stop string matches everywhere"
        self.matched: str | None = None
        self._stops = stops
        self._include = include
        self._tail = ""

    def append(self, text: str) -> str:
        """Take new text and return the text that may be shown now, up to the stop string when it is complete."""
        assert self.matched is None, f"text after the stop string {self.matched!r}"
        before, seen = self._tail, self._tail + text
        match = self._find(seen)
        if match is not None:
            self.matched, self._tail = match.stop, ""
            return seen[len(before) : match.end] if self._include else seen[: match.start]
        num_open = self._open_length(seen)
        self._tail = seen[len(seen) - num_open :]
        return text if self._include else seen[: len(seen) - num_open]

    def finish(self) -> str:
        """Return the text held back, at the end of a sequence without a stop string."""
        held, self._tail = self._tail, ""
        return "" if self._include else held

    def _find(self, text: str) -> StopMatch | None:
        found = [StopMatch(s, start, start + len(s)) for s in self._stops if (start := text.find(s)) >= 0]
        return min(found, key=lambda match: (match.end, match.start), default=None)

    def _open_length(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
