"""Time the CPU plugin's paged attention against dense SDPA of the same size, one layer, and print the ratios.

Physics: decode reads every visible key and value once, so its floor is bytes / memory bandwidth; dense SDPA reads the
same bytes from one contiguous tensor. What paging costs is the gathering of blocks into tiles. Prefill computes
4 * L * L / 2 * H * D operations, and both sides run the same kernel once the prompt's blocks are gathered.

    python benchmarks/cpu_attention.py [--threads 1] [--repeats 5] [--decode-rows 16] [--decode-tokens 4096] ...
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from zif.contract import (
    AttentionBackend,
    AttentionBatch,
    AttentionParams,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    SlidingWindowSpec,
)
from zif.host.attention import TiledAttention
from zif.host.tiling import TileLimits

BLOCK_SIZE = 16
NUM_KV_HEADS = 8
GROUP_SIZE = 4
HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Case:
    """One step: `num_requests` of `query_len` queries each, `context` tokens with KV after the step."""

    name: str
    num_requests: int
    query_len: int
    context: int
    window: int | None = None


CASES = (
    Case("decode 64 x 1k", 64, 1, 1024),
    Case("decode 64 x 1k, window 256", 64, 1, 1024, window=256),
    Case("decode 1 x 8k", 1, 1, 8192),
    Case("decode 8 x 100", 8, 1, 100),
    Case("prefill 2k", 1, 2048, 2048),
    Case("prefill 2k, window 512", 1, 2048, 2048, window=512),
    Case("prefill 512 after 1536", 1, 512, 2048),
)


def paged(case: Case, dtype: torch.dtype, backend: AttentionBackend[Any, Any]) -> Callable[[], torch.Tensor]:
    """Build one step over a randomly permuted block table; return what runs its `attend`."""
    dtype_name = str(dtype).removeprefix("torch.")
    shape = ((0,), NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, dtype_name)
    spec = FullAttentionSpec(*shape) if case.window is None else SlidingWindowSpec(*shape, window=case.window)
    group = KVGroup(spec, backend.kv_layout(spec))
    per_request = -(-case.context // BLOCK_SIZE)
    num_blocks = case.num_requests * per_request
    arena = KVArena(group.layout.block_bytes, num_blocks + 1, (group,))
    memory = torch.empty(arena.num_bytes, dtype=torch.uint8)
    memory.view(dtype).normal_()
    cache = backend.bind(arena, 0, memory)[0]
    table = (np.random.default_rng(0).permutation(num_blocks) + 1).astype(np.int32).reshape(-1, per_request)
    batch = AttentionBatch(
        query_start=(np.arange(case.num_requests + 1) * case.query_len).astype(np.int32),
        seq_lens=np.full(case.num_requests, case.context, dtype=np.int32),
        block_table=table,
        slots=np.zeros(case.num_requests * case.query_len, dtype=np.int64),
        block_size=BLOCK_SIZE,
        window=case.window,
    )
    prepared = backend.prepare(batch)
    query = torch.randn(case.num_requests * case.query_len, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM).to(dtype)
    params = AttentionParams(HEAD_DIM**-0.5, window=case.window)
    return lambda: backend.attend(query, cache, prepared, params)


def dense(case: Case, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Build dense SDPA of the same size, every request padded to nothing: the best case."""
    seen = case.context if case.window is None or case.query_len > 1 else min(case.window, case.context)
    query = torch.randn(case.num_requests, NUM_KV_HEADS * GROUP_SIZE, case.query_len, HEAD_DIM).to(dtype)
    keys, values = (torch.randn(case.num_requests, NUM_KV_HEADS, seen, HEAD_DIM).to(dtype) for _ in range(2))
    mask = None
    if case.query_len > 1 and (case.query_len < seen or case.window is not None):
        positions = torch.arange(seen - case.query_len, seen)[:, None]
        mask = torch.arange(seen) <= positions
        if case.window is not None:
            mask &= torch.arange(seen) > positions - case.window
    causal = case.query_len > 1 and mask is None
    return lambda: F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def seconds(function: Callable[[], torch.Tensor], repeats: int) -> float:
    """Return the median of `repeats` runs after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="more than the idle cores makes every number wait")
    for limit in fields(TileLimits):
        parser.add_argument("--" + limit.name.replace("_", "-"), type=int, default=limit.default)
    given = vars(parser.parse_args())
    repeats = given.pop("repeats")
    torch.set_num_threads(given.pop("threads"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, tiles {given}")
    print(f"{'case':<28} {'dtype':<9} {'paged ms':>9} {'dense ms':>9} {'ratio':>6}")
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            ours = seconds(paged(case, dtype, TiledAttention(TileLimits(**given))), repeats)
            theirs = seconds(dense(case, dtype), repeats)
            name = str(dtype).removeprefix("torch.")
            print(f"{case.name:<28} {name:<9} {ours * 1e3:9.2f} {theirs * 1e3:9.2f} {ours / theirs:6.2f}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
