"""Paged attention in plain torch: the executable specification of `zif.contract.attention`.

Clear above fast: one request at a time, all its visible keys at once, float32 throughout, or float64 where the
arguments are. It runs on any torch device. Conformance compares every platform's attention with it, and a platform
without its own may serve it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, AttentionSpec, KVArena, KVLayout, KVSpec
from zif.reference.quantization import decode_vectors, encode_vectors, row_bytes


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """Where one request stands in a step.

    It owns rows `first_row` to `last_row` - 1, whose queries are at positions `first_position` and on; `seq_len`
    tokens have KV. `blocks`: [max_blocks], int64, on the device.
    """

    first_row: int
    last_row: int
    first_position: int
    seq_len: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class PreparedReference:
    """One step as the reference uses it. blocks and offsets: [T], int64, where each token's KV goes."""

    spans: tuple[RequestSpan, ...]
    blocks: torch.Tensor
    offsets: torch.Tensor


class ReferenceAttention(AttentionBackend[torch.Tensor, PreparedReference]):
    """The reference. The cache of a layer is a view [num_cells, 2, block_size, K, D]; keys are 0, values 1.

    Of dtype "int8" the last axis is a row of codes and their scale, as `zif.reference.quantization` makes it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    def kv_layout(self, spec: KVSpec) -> KVLayout:
        assert isinstance(spec, AttentionSpec), f"KV of kind {spec.kind!r} is not claimed"
        elements = row_bytes(spec.head_dim) if spec.dtype == "int8" else spec.head_dim
        shape = (len(spec.layers), 2, spec.block_size, spec.num_kv_heads, elements)
        num_bytes = torch.Size(shape).numel() * _torch_dtype(spec.dtype).itemsize
        return KVLayout(num_bytes, ("layer", "kv", "token", "head", "element"), shape, spec.dtype)

    def bind(self, arena: KVArena, group: int, memory: torch.Tensor) -> Sequence[torch.Tensor]:
        layout = arena.groups[group].layout
        num_cells = arena.num_cells(group)
        cells = memory[: num_cells * layout.block_bytes].view(_torch_dtype(layout.dtype)).view(num_cells, *layout.shape)
        return cells.unbind(1)

    def prepare(self, batch: AttentionBatch) -> PreparedReference:
        table = torch.as_tensor(batch.block_table, dtype=torch.int64, device=self._device)
        slots = torch.as_tensor(batch.slots, dtype=torch.int64, device=self._device)
        starts = batch.query_start.tolist()
        spans = tuple(
            RequestSpan(first, last, seq_len - (last - first), seq_len, table[row])
            for row, (first, last, seq_len) in enumerate(zip(starts, starts[1:], batch.seq_lens.tolist(), strict=False))
        )
        return PreparedReference(spans, slots // batch.block_size, slots % batch.block_size)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, prepared: PreparedReference) -> None:
        for part, fresh in enumerate((key, value)):
            stored = encode_vectors(fresh) if cache.dtype == torch.int8 else fresh.to(cache.dtype)
            cache[prepared.blocks, part, prepared.offsets] = stored

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, prepared: PreparedReference, params: AttentionParams
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for span in prepared.spans:
            if span.last_row > span.first_row:
                rows = slice(span.first_row, span.last_row)
                out[rows] = _attend_request(query[rows], cache, span, params)
        return out


def _attend_request(
    query: torch.Tensor, cache: torch.Tensor, span: RequestSpan, params: AttentionParams
) -> torch.Tensor:
    """Attend from one request's queries, [L, H, D], to its visible keys. Returns [L, H, D], dtype of query."""
    first_key = 0 if params.window is None else max(0, span.first_position - params.window + 1)
    keys, values = _gather(cache, span, first_key, query.shape[-1])
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = _wide(query).view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)

    scores = torch.einsum("lkgd,skd->lkgs", grouped, keys) * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    query_positions = torch.arange(span.first_position, span.seq_len, device=query.device)[:, None]
    key_positions = torch.arange(first_key, span.seq_len, device=query.device)[None, :]
    visible = key_positions <= query_positions
    if params.window is not None:
        visible &= key_positions > query_positions - params.window
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)

    weights = _softmax(scores, params.sinks)
    return torch.einsum("lkgs,skd->lkgd", weights, values).reshape(query.shape).to(query.dtype)


def _gather(cache: torch.Tensor, span: RequestSpan, first_key: int, head_dim: int) -> torch.Tensor:
    """Return keys and values at positions `first_key` to seq_len - 1: [2, S, K, D], float32 or wider.

    Only blocks that hold such a position are read: other entries of the block table are undefined.
    """
    block_size = cache.shape[2]
    first_block, last_block = first_key // block_size, -(-span.seq_len // block_size)
    blocks = cache[span.blocks[first_block:last_block]].transpose(0, 1).flatten(1, 2)
    offset = first_block * block_size
    seen = blocks[:, first_key - offset : span.seq_len - offset]
    return decode_vectors(seen, head_dim) if seen.dtype == torch.int8 else _wide(seen)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return softmax over the last axis; a sink adds to the denominator only. scores: [L, K, G, S]. sinks: [H]."""
    if sinks is None:
        return scores.softmax(-1)
    num_queries, num_kv_heads, group_size, _ = scores.shape
    sink_column = _wide(sinks).view(1, num_kv_heads, group_size, 1).expand(num_queries, -1, -1, -1)
    return torch.cat([scores, sink_column], dim=-1).softmax(-1)[..., :-1]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x as float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), f"dtype {name!r} is no torch dtype; plans admit only those"
    return dtype
