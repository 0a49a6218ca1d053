"""The shapes that programs are compiled for, and how the requests of a step are put into them. Integers only.

XLA compiles one program per shape, so shapes are few and fixed before the first request: a step's requests are put into
groups of `rows` requests of up to `width` new tokens each, whose tokens so far fill up to `blocks` blocks; what is
short is padded. Requests that decode are one group of width 1, chunks of prompts are others:

    request   new tokens  blocks        shape (rows, width, blocks)
    a, b, c        1      3, 9, 20      (8, 1, 64)      five rows of padding
    d             40      3             (1, 64, 16)     24 tokens of padding
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_SMALLEST_WIDTH = 16
_SMALLEST_ROWS = 8
_SMALLEST_BLOCKS = 16
_GROWTH = 4
_MAX_CHUNK_ROWS = 8


@dataclass(frozen=True, slots=True, order=True)
class StepShape:
    """`rows` requests of up to `width` new tokens, each with up to `blocks` blocks."""

    rows: int
    width: int
    blocks: int

    @property
    def num_tokens(self) -> int:
        """Return the tokens that the program computes, padding included."""
        return self.rows * self.width

    def __str__(self) -> str:
        return f"{self.rows} requests x {self.width} tokens, {self.blocks} blocks each"


@dataclass(frozen=True, slots=True)
class StepGroup:
    """Requests of a step that one program computes, as indices into the step."""

    shape: StepShape
    requests: tuple[int, ...]


def sizes(smallest: int, largest: int) -> tuple[int, ...]:
    """Return sizes that grow fourfold from `smallest` and end with `largest`."""
    found = []
    size = smallest
    while size < largest:
        found.append(size)
        size *= _GROWTH
    return (*found, largest)


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes that shapes are made of, each rising; the last ones are the engine's limits.

    `rows` are batches of requests that decode, `widths` chunks of prompts, `samples` places where a step samples.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: tuple[int, ...]

    @classmethod
    def of(cls, max_seqs: int, max_tokens: int, max_blocks: int, max_samples: int | None = None) -> "Buckets":
        """Choose sizes for steps of at most `max_seqs` requests and `max_tokens` tokens."""
        max_seqs = min(max_seqs, max_tokens)
        return cls(
            rows=sizes(_SMALLEST_ROWS, max_seqs),
            widths=sizes(_SMALLEST_WIDTH, max_tokens),
            blocks=sizes(_SMALLEST_BLOCKS, max_blocks),
            samples=sizes(_SMALLEST_ROWS, max(max_samples or max_seqs, max_seqs)),
        )

    def shapes(self) -> tuple[StepShape, ...]:
        """Return every shape that a group may take."""
        pairs = [(rows, 1) for rows in self.rows]
        pairs += [(rows, width) for width in self.widths if width > 1 for rows in self._chunk_rows(width)]
        return tuple(StepShape(rows, width, blocks) for rows, width in pairs for blocks in self.blocks)

    def groups(self, num_tokens: Sequence[int], num_blocks: Sequence[int]) -> Iterator[StepGroup]:
        """Put the requests of a step into groups, given the new tokens and the blocks of each."""
        by_width: dict[int, list[int]] = {}
        for request, tokens in enumerate(num_tokens):
            by_width.setdefault(1 if tokens == 1 else _fitting(self.widths, tokens), []).append(request)
        for width, requests in sorted(by_width.items()):
            batches = self.rows if width == 1 else self._chunk_rows(width)
            while requests:
                taken, requests = requests[: batches[-1]], requests[batches[-1] :]
                blocks = _fitting(self.blocks, max(num_blocks[request] for request in taken))
                yield StepGroup(StepShape(_fitting(batches, len(taken)), width, blocks), tuple(taken))

    def larger(self, shape: StepShape) -> Iterator[StepShape]:
        """Yield the other shapes that would also serve, smallest first."""
        fitting = [
            other
            for other in self.shapes()
            if other != shape
            and other.rows >= shape.rows
            and other.width >= shape.width
            and other.blocks >= shape.blocks
        ]
        yield from sorted(fitting, key=lambda other: other.num_tokens * other.blocks)

    def samples_for(self, count: int) -> int:
        """Return the size of the program that samples at `count` places."""
        return _fitting(self.samples, count)

    def _chunk_rows(self, width: int) -> tuple[int, ...]:
        """Return how many chunks of that width go together: one, or as many as a step can have, up to a limit."""
        most = min(_MAX_CHUNK_ROWS, self.rows[-1], max(1, self.widths[-1] // width))
        return (1,) if most == 1 else (1, most)


def _fitting(choices: Sequence[int], size: int) -> int:
    found = next((choice for choice in choices if choice >= size), None)
    assert found is not None, f"{size} is beyond the largest size, {choices[-1]}; the plan promised that it is not"
    return found
