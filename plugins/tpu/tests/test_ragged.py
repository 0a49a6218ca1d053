"""What the ragged kernel is given: torch_xla's plain version of it, in its place, attends as the reference does."""

import importlib.util

import numpy as np
import pytest
import torch

from zif.contract import AttentionBatch, AttentionParams, FullAttentionSpec, KVArena, KVGroup, SlidingWindowSpec
from zif.reference.attention import ReferenceAttention

HEADS, KV_HEADS, DIM, BLOCK, LAYERS = 4, 2, 128, 16, 3


@pytest.mark.parametrize(
    "requests", [[(1, 40), (1, 7), (1, 16)], [(24, 40)], [(5, 40), (16, 16), (3, 3)], [(8, 40), (8, 17)]]
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0)])
def test_attention_through_the_kernels_arguments(requests, window, softcap):
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not installed: `make test-tpu` has it")
    from zif_tpu import ragged
    from zif_tpu.attention import LayerCache, Pages, XlaAttention

    chance = torch.Generator().manual_seed(1)
    shape = ((0, 1, 2), KV_HEADS, DIM, BLOCK, "float32")
    spec = FullAttentionSpec(*shape) if window is None else SlidingWindowSpec(*shape, window=window)
    lengths, seq_lens = np.array([q for q, _ in requests]), np.array([n for _, n in requests])
    counts = -(-seq_lens // BLOCK)
    table = np.zeros((len(requests), counts.max()), dtype=np.int32)
    ids = iter(np.random.default_rng(0).permutation(int(counts.sum())) + 1)
    for row, count in enumerate(counts):
        table[row, :count] = [next(ids) for _ in range(count)]
    whole = _batch(table, seq_lens, seq_lens, window)
    step = _batch(table, lengths, seq_lens, window)
    keys, values = (torch.randn(int(seq_lens.sum()), KV_HEADS, DIM, generator=chance) for _ in range(2))
    query = torch.randn(int(lengths.sum()), HEADS, DIM, generator=chance)
    params = AttentionParams(scale=DIM**-0.5, window=window, softcap=softcap)

    expected = _expected(spec, (whole, step), (keys, values), query, params)
    ours = XlaAttention("cpu")
    arena = _arena(ours, spec, int(counts.sum()) + 1)
    rows = torch.zeros(arena.num_bytes // (8 * KV_HEADS * DIM), 2 * KV_HEADS, DIM)
    cache = LayerCache(Pages(rows, torch.float32, aliases=True), 1, LAYERS)
    ours.write(keys, values, cache, ours.prepare(whole))
    prepared = ours.prepare(step)
    assert ragged.serves(cache, params)
    padded = ragged.attend(query.index_select(0, prepared.gather), cache, prepared, params, use_kernel=False)
    torch.testing.assert_close(padded.index_select(0, prepared.scatter), expected, atol=2e-6, rtol=2e-5)


def _batch(table, lengths, seq_lens, window):
    rows = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n - q, n) for q, n in zip(lengths, seq_lens, strict=True)])
    return AttentionBatch(
        query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        block_table=table,
        slots=table[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        block_size=BLOCK,
        window=window,
    )


def _arena(backend, spec, num_blocks):
    group = KVGroup(spec, backend.kv_layout(spec))
    return KVArena(group.layout.block_bytes, num_blocks, (group,))


def _expected(spec, batches, stored, query, params):
    whole, step = batches
    backend = ReferenceAttention()
    arena = _arena(backend, spec, int(whole.block_table.max()) + 1)
    cache = backend.bind(arena, 0, torch.zeros(arena.num_bytes, dtype=torch.uint8))[1]
    backend.write(*stored, cache, backend.prepare(whole))
    return backend.attend(query, cache, backend.prepare(step), params)
