"""How a step's attention is cut into tiles: integer work, done once per group and step and shared by its layers.

Nothing here touches keys or values. Called by `zif.host.attention`.

    decode rows, longest first            a prompt chunk: queries down, keys across
    row 0  | tile 0 | tile 1 | tile 2 |    q0 | part |
    row 1  | tile 0 | tile 1 |             q1 | part | part |
    row 2  | tile 0 |                      q2 |      | part | part |   (a window hides what lies far left)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from zif.contract import AttentionBatch, HostArray


@dataclass(frozen=True, slots=True)
class TileLimits:
    """The size of tiles, measured in `benchmarks/cpu_attention.py`.

    A decode tile holds `decode_tokens` keys of at most `decode_rows` rows; a prompt tile `prompt_keys` keys, used by
    `prompt_queries` queries at a time. Where torch's fused kernel serves, `fused_queries` queries go at a time, if they
    see `fused_keys` keys at most.
    """

    decode_rows: int = 16
    decode_tokens: int = 2048
    prompt_keys: int = 512
    prompt_queries: int = 128
    fused_queries: int = 512
    fused_keys: int = 8192


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """Blocks [n, B] of the first n decode rows; hidden [n, B * block_size], or None when every key is visible.

    hidden_rows, hidden_keys: [hidden places], int64, the indices where `hidden` is true.
    """

    blocks: torch.Tensor
    hidden: torch.Tensor | None
    hidden_rows: torch.Tensor
    hidden_keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Some single-token rows of the step, longest first, and their tiles. rows: [N], int64."""

    rows: torch.Tensor
    tiles: tuple[DecodeTile, ...]


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Queries `first_query` to `last_query` - 1 of a chunk against a tile; hidden: [queries, keys], or None."""

    first_query: int
    last_query: int
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PromptTile:
    """Keys `first_token` to `last_token` - 1 of the gathered blocks, [B], and the queries that see any of them."""

    blocks: torch.Tensor
    first_token: int
    last_token: int
    parts: tuple[PromptPart, ...]


@dataclass(frozen=True, slots=True)
class FusedPart:
    """Queries `first_query` to `last_query` - 1 of a chunk against all the keys they see, without tiles.

    They see keys `first_token` to `last_token` - 1 of the gathered blocks, [B], under the square causal mask that the
    kernel knows by itself when `causal`, else all but `hidden`: [queries, keys], or None.
    """

    first_query: int
    last_query: int
    blocks: torch.Tensor
    first_token: int
    last_token: int
    causal: bool
    hidden: torch.Tensor | None


class PromptChunk:
    """One request's adjacent rows of the step, `first_row` to `last_row` - 1, and its two ways of being cut.

    Which one serves depends on the layer; each is cut when the first layer asks for it.
    """

    def __init__(self, batch: AttentionBatch, request: int, limits: TileLimits) -> None:
        self.first_row, self.last_row = batch.query_start[request : request + 2].tolist()
        self._seq_len = int(batch.seq_lens[request])
        self._first_position = self._seq_len - (self.last_row - self.first_row)
        self._window = batch.window
        self._block_size = batch.block_size
        self._limits = limits
        first_block = self._first_visible(self._first_position) // batch.block_size
        self._table = torch.from_numpy(
            batch.block_table[request, first_block : -(-self._seq_len // batch.block_size)].astype(np.int64)
        )
        self._table_start = first_block * batch.block_size

    @cached_property
    def tiles(self) -> tuple[PromptTile, ...]:
        """Cut the keys, and for each piece the queries that see any of it."""
        width = max(1, self._limits.prompt_keys // self._block_size)
        return tuple(self._tile(block, width) for block in range(0, self._table.shape[0], width))

    @cached_property
    def fused(self) -> tuple[FusedPart, ...] | None:
        """Cut the queries only; None when some would see more keys than the limit."""
        whole = self._first_position == 0 and (self._window is None or self._seq_len <= self._window)
        size = self._seq_len if whole else self._limits.fused_queries
        starts = range(self._first_position, self._seq_len, size)
        parts = tuple(self._fused(start, min(start + size, self._seq_len), whole) for start in starts)
        too_long = any(part.last_token - part.first_token > self._limits.fused_keys for part in parts)
        return None if too_long and not whole else parts

    def _first_visible(self, position: int) -> int:
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _tile(self, block: int, width: int) -> PromptTile:
        start = self._table_start + block * self._block_size
        first = max(start, self._first_visible(self._first_position))
        last = min(start + width * self._block_size, self._seq_len)
        return PromptTile(
            self._table[block : block + width], first - start, last - start, tuple(self._parts(first, last))
        )

    def _parts(self, first_key: int, last_key: int) -> Iterator[PromptPart]:
        """Cut the queries that see any of the keys `first_key` to `last_key` - 1."""
        first = max(self._first_position, first_key)
        last = self._seq_len if self._window is None else min(self._seq_len, last_key - 1 + self._window)
        for start in range(first, last, self._limits.prompt_queries):
            end = min(start + self._limits.prompt_queries, last)
            hidden = self._hidden(range(start, end), range(first_key, last_key))
            yield PromptPart(start - self._first_position, end - self._first_position, hidden)

    def _fused(self, start: int, end: int, whole: bool) -> FusedPart:
        first_key = self._first_visible(start)
        first_block = (first_key - self._table_start) // self._block_size
        origin = self._table_start + first_block * self._block_size
        blocks = self._table[first_block : -(-(end - self._table_start) // self._block_size)]
        hidden = None if whole else self._hidden(range(start, end), range(first_key, end))
        offset = self._first_position
        return FusedPart(start - offset, end - offset, blocks, first_key - origin, end - origin, whole, hidden)

    def _hidden(self, queries: range, keys: range) -> torch.Tensor | None:
        """Return which of `keys` each of `queries` must not see, both given as positions; None when it sees all."""
        query_positions = torch.arange(queries.start, queries.stop)[:, None]
        key_positions = torch.arange(keys.start, keys.stop)
        hidden = key_positions > query_positions
        if self._window is not None:
            hidden |= key_positions <= query_positions - self._window
        return hidden if bool(hidden.any()) else None


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One group's step. write_blocks, write_offsets: [T], int64, where each token's KV goes."""

    window: int | None
    block_size: int
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor
    decodes: tuple[DecodeRows, ...]
    chunks: tuple[PromptChunk, ...]


def prepare_step(batch: AttentionBatch, limits: TileLimits, shortest: int = 1) -> PreparedStep:
    """Cut one step into tiles. Requests with fewer than `shortest` tokens are left to the caller."""
    slots = torch.from_numpy(np.asarray(batch.slots, dtype=np.int64))
    lengths = np.diff(batch.query_start)
    single = np.flatnonzero(lengths == 1) if shortest <= 1 else np.empty(0, np.int64)
    return PreparedStep(
        window=batch.window,
        block_size=batch.block_size,
        write_blocks=slots // batch.block_size,
        write_offsets=slots % batch.block_size,
        decodes=tuple(_decodes(batch, single, limits)),
        chunks=tuple(
            PromptChunk(batch, int(request), limits) for request in np.flatnonzero(lengths >= max(2, shortest))
        ),
    )


def _decodes(batch: AttentionBatch, requests: HostArray, limits: TileLimits) -> Iterator[DecodeRows]:
    """Sort single-token requests by the blocks they see, most first, and cut them into bounded groups."""
    last_key = batch.seq_lens[requests].astype(np.int64) - 1
    first_key = np.zeros_like(last_key) if batch.window is None else np.maximum(last_key - batch.window + 1, 0)
    num_blocks = last_key // batch.block_size - first_key // batch.block_size + 1
    order = np.argsort(-num_blocks, kind="stable")
    for start in range(0, len(order), limits.decode_rows):
        chosen = order[start : start + limits.decode_rows]
        tiles = _DecodeTiling(batch, requests[chosen], first_key[chosen], last_key[chosen], num_blocks[chosen])
        rows = batch.query_start[requests[chosen]].astype(np.int64)
        yield DecodeRows(torch.from_numpy(rows), tuple(tiles.cut(limits.decode_tokens)))


@dataclass(frozen=True, slots=True)
class _DecodeTiling:
    """The visible keys of some single-token requests, longest first. All but `batch`: [N], int64."""

    batch: AttentionBatch
    requests: HostArray
    first_key: HostArray
    last_key: HostArray
    num_blocks: HostArray

    def cut(self, max_tokens: int) -> Iterator[DecodeTile]:
        width = max(1, max_tokens // (len(self.requests) * self.batch.block_size))
        for start in range(0, int(self.num_blocks[0]), width):
            num_rows = int(np.count_nonzero(self.num_blocks > start))
            yield self._tile(num_rows, start, min(width, int(self.num_blocks[0]) - start))

    def _tile(self, num_rows: int, start: int, width: int) -> DecodeTile:
        block_size = self.batch.block_size
        relative = np.arange(start, start + width)
        logical = self.first_key[:num_rows, None] // block_size + relative
        used = relative < self.num_blocks[:num_rows, None]
        # Unused places take a row's first block: an address that is legal, and near.
        logical = np.where(used, logical, self.first_key[:num_rows, None] // block_size)
        blocks = self.batch.block_table[self.requests[:num_rows, None], logical].astype(np.int64)
        positions = (self.first_key[:num_rows, None] // block_size + start) * block_size + np.arange(width * block_size)
        hidden = (positions < self.first_key[:num_rows, None]) | (positions > self.last_key[:num_rows, None])
        rows, keys = (torch.from_numpy(index) for index in np.nonzero(hidden))
        return DecodeTile(torch.from_numpy(blocks), torch.from_numpy(hidden) if len(rows) else None, rows, keys)
