"""Paged attention in plain torch: look up where each visible key lies, gather it, and attend.

The cache of a layer is a view [num_cells, block_size, 2, K, D]: keys are 0, values 1; of codes it is read and written
like one. All index work is done once per step in `prepare`. Scores and sums are float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from zif.contract import (
    AttentionBackend,
    AttentionBatch,
    AttentionParams,
    AttentionSpec,
    HostArray,
    KVArena,
    KVLayout,
    KVSpec,
)
from zif_conformance.reference_platform.codes import CodedCache
from zif_conformance.reference_platform.faults import FaultInjector
from zif_conformance.reference_platform.layout import kv_layout

Cache = torch.Tensor | CodedCache


@dataclass(frozen=True, slots=True)
class Places:
    """Where tokens lie in the cache. blocks, offsets: [N], int64."""

    blocks: torch.Tensor
    offsets: torch.Tensor


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One request's rows of the step, the keys that any of them sees, and which: visible [L, S], bool."""

    rows: slice
    keys: Places
    visible: torch.Tensor


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One step: where its tokens are written, and its requests."""

    written: Places
    requests: tuple[RequestRows, ...]


class TorchAttention(AttentionBackend[Cache, PreparedStep]):
    """Attention, one request after the other, so that no request can influence another."""

    def __init__(self, faults: FaultInjector) -> None:
        self._faults = faults

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        return kv_layout(spec)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[Cache]:
        caches, spec = self._views(arena, group, memory), arena.groups[group].spec
        if spec.dtype != "int8":
            return caches
        assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
        return [CodedCache(rows, spec.head_dim) for rows in caches]

    def _views(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[torch.Tensor]:
        layout, num_cells = arena.groups[group].layout, arena.num_cells(group)
        cells = memory[: num_cells * layout.block_bytes].view(getattr(torch, layout.dtype))
        return cells.view(num_cells, *layout.shape).unbind(1)

    def prepare(self, batch: AttentionBatch) -> PreparedStep:
        slots = np.asarray(batch.slots, dtype=np.int64)
        return PreparedStep(_places(slots // batch.block_size, slots % batch.block_size), tuple(_requests(batch)))

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: Cache, prepared: PreparedStep) -> None:
        self._faults.kernel()
        written = prepared.written
        cache[written.blocks, written.offsets] = torch.stack((key, value), dim=1).to(cache.dtype)

    def attend(
        self, query: torch.Tensor, cache: Cache, prepared: PreparedStep, params: AttentionParams
    ) -> torch.Tensor:
        self._faults.kernel()
        out = torch.empty_like(query)
        for request in prepared.requests:
            keys, values = cache[request.keys.blocks, request.keys.offsets].float().permute(1, 2, 0, 3)
            queries = query[request.rows].float().transpose(0, 1)
            score = _attend if params.softcap is None else _attend_capped
            out[request.rows] = score(queries, keys, values, request.visible, params).transpose(0, 1).to(query.dtype)
        return out


def _requests(batch: AttentionBatch) -> Iterator[RequestRows]:
    starts = batch.query_start.tolist()
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        first_row, last_row = starts[request], starts[request + 1]
        if first_row == last_row:
            continue
        queries = np.arange(seq_len - (last_row - first_row), seq_len)
        window = batch.window or seq_len
        keys = np.arange(max(0, int(queries[0]) - window + 1), seq_len)
        visible = (keys <= queries[:, None]) & (keys > queries[:, None] - window)
        places = _places(batch.block_table[request, keys // batch.block_size], keys % batch.block_size)
        yield RequestRows(slice(first_row, last_row), places, torch.from_numpy(visible))


def _places(blocks: HostArray, offsets: HostArray) -> Places:
    return Places(torch.from_numpy(blocks.astype(np.int64)), torch.from_numpy(offsets.astype(np.int64)))


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Attend with torch's fused kernel. query: [H, L, D]. keys, values: [K, S, D]. Returns [H, L, D], float32.

    A sink is one more key: a zero vector, whose score is the sink and whose value adds nothing.
    """
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    if params.sinks is not None:
        keys, values = functional.pad(keys, (0, 0, 0, 1)), functional.pad(values, (0, 0, 0, 1))
        sinks = params.sinks.float()[:, None, None].expand(-1, len(visible), 1)
        mask = torch.cat((mask.expand(len(query), -1, -1), sinks), dim=-1)
    heads, head_keys, head_values = query[None], keys[None], values[None]
    return functional.scaled_dot_product_attention(
        heads, head_keys, head_values, attn_mask=mask, scale=params.scale, enable_gqa=True
    )[0]


def _attend_capped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """Attend with a soft cap, which the fused kernel does not know. Shapes as in `_attend`."""
    assert params.softcap is not None
    repeats = len(query) // len(keys)
    keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
    scores = torch.tanh(query @ keys.mT * (params.scale / params.softcap)) * params.softcap
    scores = torch.where(visible, scores, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if params.sinks is not None:
        total = total + torch.exp(params.sinks.float()[:, None, None] - highest)
    return weights @ values / total
