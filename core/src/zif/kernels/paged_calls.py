"""Starting the kernels of `zif.kernels.paged`: what one call of attention, or of the write before it, is given."""

from dataclasses import dataclass, field, replace

import torch
import triton

from zif.contract import AttentionParams
from zif.kernels.dense_prefill import Span, attend_dense, serves
from zif.kernels.launch import Launcher
from zif.kernels.paged import _merge_splits, _paged_attention, _write_kv
from zif.kernels.step_buffers import StepArrays
from zif.kernels.tuning import LaunchConfig

_MIN_SPLIT_KEYS = 256
_MAX_SPLITS = 64
MAX_SHORT_QUERIES = 8
"""New tokens of a request that still count as few: a token and its draft."""

_LONG = 1 << 20
"""More queries than any tile holds: asks the tuning for the configuration of prompts."""


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's KV. keys, values: flat views that start at the layer's first key and value of block 0.

    scales: [2], float32, of keys and values, where they are stored in a narrower dtype; else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    block_stride: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Members:
    """The requests of a step that one kind of program serves.

    ids: [N], int32. starts: [N + 1], int32, their queries summed up. `single` when each has one query. No row of
    keys among them is longer than `max_keys`.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    num_queries: int
    single: bool
    max_keys: int


@dataclass(frozen=True, slots=True)
class PreparedPages:
    """One group's step, on the device.

    `short` are requests with few queries, `long` the others. Of these, the array library may serve the rows in `dense`;
    `others` are then those that are left. `bucket` is the number of requests after padding, where
    every request has one token and the arrays stay where they are.
    """

    arrays: StepArrays
    short: Members | None
    long: Members | None
    window: int | None
    bucket: int | None = None
    dense: tuple[Span, ...] = ()
    others: Members | None = None


@dataclass(frozen=True, slots=True)
class Extras:
    """What the kernels know beyond the contract's attention.

    slopes: [H], float32, of ALiBi (Press et al., 2022). lse: [T, H], float32, gets the logarithm of each softmax's
    denominator. Without `causal`, every query sees all tokens of its request.
    """

    slopes: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    causal: bool = True

    @property
    def are_plain(self) -> bool:
        """Say whether nothing is asked beyond the contract."""
        return self.slopes is None and self.lse is None and self.causal


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one call is asked. `split_keys` 0: as many splits as fill the device, else keys of each.

    `fresh` are the step's own keys and values, [T, K, D], from which the array library may serve whole prompts.
    """

    params: AttentionParams
    extras: Extras = field(default_factory=Extras)
    split_keys: int = 0
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None


def write_kv(launch: Launcher, key: torch.Tensor, value: torch.Tensor, cache: PagedCache, slots: torch.Tensor) -> None:
    """Store keys and values, [T, K, D], at `slots`, [T]; -1 stores nothing. Mutates the cache.

    In a narrower dtype, each is divided by its scale and clamped to what the dtype can hold.
    """
    num_rows = slots.shape[0] * cache.num_kv_heads
    config = launch.tuning.config("write_kv", head_dim=cache.head_dim)
    dtype = cache.keys.dtype
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 127.0
    sizes = num_rows, key.stride(0), value.stride(0), cache.block_stride
    launch(
        _write_kv,
        (triton.cdiv(num_rows, config["ROWS"]),),
        (key, value, cache.keys, cache.values, slots, cache.scales, *sizes),
        config,
        NUM_HEADS=cache.num_kv_heads,
        HEAD_DIM=cache.head_dim,
        BLOCK_SIZE=cache.block_size,
        BLOCK_D=triton.next_power_of_2(cache.head_dim),
        LIMIT=float(limit),
        INTEGER=not dtype.is_floating_point,
    )


def paged_attention(
    launch: Launcher, query: torch.Tensor, cache: PagedCache, step: PreparedPages, call: AttentionCall
) -> torch.Tensor:
    """Attend from each query, [T, H, D], to the tokens of its own request. Returns [T, H, D], dtype of query.

    Raises `ValueError` when query heads are no multiple of KV heads, or for a window without causality.
    """
    if query.stride()[1:] != (query.shape[2], 1):
        raise ValueError(f"query has strides {query.stride()}; heads and elements must be adjacent: make it contiguous")
    if call.params.window is not None and not call.extras.causal:
        raise ValueError(f"window={call.params.window!r} needs causality; leave out the window")
    if query.shape[1] % cache.num_kv_heads:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {cache.num_kv_heads} KV heads")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    long = step.long
    if call.fresh is not None and step.dense and call.extras.are_plain and serves(query, call.params):
        attend_dense((query, *call.fresh), step.dense, call.params.scale, out)
        long = step.others
    for members in (step.short, long):
        if members is not None:
            _Launch(launch, cache, step.arrays, members, call).run(query, out)
    return out


@dataclass(frozen=True, slots=True)
class _Launch:
    """Attention of some members of a step."""

    launch: Launcher
    cache: PagedCache
    arrays: StepArrays
    members: Members
    call: AttentionCall

    def run(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """Start the kernel, and the merge where keys are split. Mutates `out`."""
        num_heads, head_dim = query.shape[1:]
        group = num_heads // self.cache.num_kv_heads
        config = self._config(query, group)
        block_m = config["BLOCK_M"]
        num_tiles = self._num_tiles(block_m // group)
        num_splits = self._num_splits(num_tiles, config)
        partial = extremes = None
        if num_splits > 1:
            rows = num_splits * num_tiles * self.cache.num_kv_heads * block_m
            partial = torch.empty(rows, head_dim, dtype=torch.float32, device=query.device)
            extremes = torch.empty(rows, 2, dtype=torch.float32, device=query.device)
        shapes = {
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "SINGLE": self.members.single,
        }
        grid = num_tiles, self.cache.num_kv_heads
        self._attend((query, out, partial, extremes), (*grid, num_splits), config, shapes)
        if num_splits > 1:
            self._merge((partial, extremes, out), grid, (block_m, num_splits), shapes)

    def _attend(
        self,
        results: tuple[torch.Tensor | None, ...],
        grid: tuple[int, ...],
        config: LaunchConfig,
        shapes: dict[str, int],
    ) -> None:
        query, out, partial, extremes = results
        assert query is not None
        cache, arrays, params, extras = self.cache, self.arrays, self.call.params, self.call.extras
        places = self.members.ids, self.members.starts, arrays.query_start, arrays.seq_lens, arrays.block_table
        strides = query.stride(0), cache.block_stride, arrays.block_table.stride(0)
        numbers = query.shape[1], params.window or 0, float(params.scale), float(params.softcap or 0.0)
        self.launch(
            _paged_attention,
            grid,
            (query, cache.keys, cache.values, out, partial, extremes, extras.lse, params.sinks, extras.slopes)
            + (*places, cache.scales, self.members.ids.shape[0], *strides, *numbers),
            config,
            **shapes,
            BLOCK_SIZE=cache.block_size,
            CAUSAL=extras.causal,
            WINDOWED=params.window is not None,
            CAPPED=params.softcap is not None,
            SPLIT_KEYS=self.call.split_keys if grid[2] > 1 else 0,
        )

    def _merge(
        self,
        results: tuple[torch.Tensor | None, ...],
        grid: tuple[int, ...],
        sizes: tuple[int, int],
        shapes: dict[str, int],
    ) -> None:
        partial, extremes, out = results
        assert out is not None
        block_m, num_splits = sizes
        members = self.members
        self.launch(
            _merge_splits,
            grid,
            (partial, extremes, out, self.call.extras.lse, members.ids, members.starts, self.arrays.query_start)
            + (self.arrays.seq_lens, self.cache.scales, members.ids.shape[0], num_splits, out.shape[1]),
            self.launch.tuning.config("merge_attention", head_dim=self.cache.head_dim),
            **shapes,
            BLOCK_M=block_m,
        )

    def _config(self, query: torch.Tensor, group: int) -> LaunchConfig:
        """Choose tiles; at least one query with all its heads goes into a tile."""
        long = self.members.num_queries > MAX_SHORT_QUERIES * self.members.ids.shape[0]
        mean = _LONG if long or self.call.split_keys else -(-self.members.num_queries // self.members.ids.shape[0])
        config = self.launch.tuning.config(
            "paged_attention",
            rows=group * mean,
            head_dim=self.cache.head_dim,
            query_bytes=query.element_size(),
            kv_bytes=self.cache.keys.element_size(),
            windowed=int(self.call.params.window is not None),
        )
        if config["BLOCK_M"] >= group:
            return config
        tiles = {**dict(config.tiles), "BLOCK_M": triton.next_power_of_2(group)}
        return replace(config, tiles=tuple(tiles.items()))

    def _num_tiles(self, queries: int) -> int:
        """Bound the tiles: kernels of those that there are not end at once."""
        num_members = self.members.ids.shape[0]
        return num_members if self.members.single else self.members.num_queries // queries + num_members

    def _num_splits(self, num_tiles: int, config: LaunchConfig) -> int:
        max_keys = self.members.max_keys
        if self.call.split_keys:
            # The keys of a window begin anywhere, and are walked over from the start of a tile.
            return max(1, -(-(max_keys + config["BLOCK_N"]) // self.call.split_keys))
        wanted = config["PROGRAMS"] // max(1, num_tiles * self.cache.num_kv_heads)
        wanted = max(1, min(wanted, max_keys // _MIN_SPLIT_KEYS, _MAX_SPLITS))
        # A power of two, as all measurements had it.
        return 1 << (wanted.bit_length() - 1)
