"""IPEX on against IPEX off: attention of realistic shapes, and generation end to end, in one process, in turns.

Run in the environment of `make test-intel`: `python benchmarks/ipex.py`. Prints medians and ratios; IPEX off is the
torch path of the CPU plugin, on the same torch.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zif import LLM, SamplingParams
from zif.contract import AttentionBackend, AttentionBatch, AttentionParams, FullAttentionSpec, KVArena, KVGroup
from zif.host.attention import TiledAttention

MODEL = Path(__file__).resolve().parents[1] / "examples/embedded_model/checkpoint"
HEADS, KV_HEADS, HEAD_DIM, BLOCK, LAYERS = 32, 8, 128, 16, 4


@dataclass(frozen=True)
class Case:
    """`requests` requests with `queries` new tokens each, after which they have `length` tokens."""

    name: str
    requests: int
    queries: int
    length: int


CASES = (
    Case("decode 1 x 512", 1, 1, 512),
    Case("decode 8 x 512", 8, 1, 512),
    Case("decode 8 x 2048", 8, 1, 2048),
    Case("decode 32 x 512", 32, 1, 512),
    Case("prefill 4 x 128", 4, 128, 128),
    Case("prefill 1 x 512", 1, 512, 512),
    Case("prefill 1 x 512 after 1536", 1, 512, 2048),
)


def attention_step(backend: AttentionBackend, case: Case, dtype: str) -> Callable[[], torch.Tensor]:
    """Return a function that prepares, writes and attends once."""
    spec = FullAttentionSpec(tuple(range(LAYERS)), KV_HEADS, HEAD_DIM, BLOCK, dtype)
    group = KVGroup(spec, backend.kv_layout(spec))
    blocks = -(-case.length // BLOCK)
    arena = KVArena(group.layout.block_bytes, 1 + case.requests * blocks, (group,))
    memory = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    stored = memory.view(getattr(torch, dtype))
    stored.copy_(torch.randn(stored.shape, generator=torch.Generator().manual_seed(0)))
    cache = backend.bind(arena, 0, memory)[1]
    order = np.random.default_rng(0).permutation(case.requests * blocks) + 1
    table = order.reshape(case.requests, blocks).astype(np.int32)
    positions = np.tile(np.arange(case.length - case.queries, case.length), case.requests)
    rows = np.repeat(np.arange(case.requests), case.queries)
    batch = AttentionBatch(
        query_start=(np.arange(case.requests + 1) * case.queries).astype(np.int32),
        seq_lens=np.full(case.requests, case.length, dtype=np.int32),
        block_table=table,
        slots=table[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK,
        block_size=BLOCK,
        window=None,
    )
    tokens = case.requests * case.queries
    query, key, value = (torch.randn(tokens, h, HEAD_DIM).to(stored.dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    params = AttentionParams(scale=HEAD_DIM**-0.5)

    def step() -> torch.Tensor:
        prepared = backend.prepare(batch)
        backend.write(key, value, cache, prepared)
        return backend.attend(query, cache, prepared, params)

    return step


def in_turns(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each function, run one after the other, round by round."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for taken, function in zip(times, functions, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def generation(setting: str, dtype: str, batch: int) -> tuple[LLM, Callable[[], object]]:
    """Open the embedded model with IPEX on or off; return it and a function that generates 64 tokens per prompt."""
    os.environ["ZIF_INTEL_IPEX"] = setting
    llm = LLM(str(MODEL), platform="intel", dtype=dtype, kv_bytes=1 << 28, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": [3 + (i * 7 + j) % 400 for j in range(128)]} for i in range(batch)]
    sampling = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    return llm, lambda: llm.generate(prompts, sampling, use_tqdm=False)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    import intel_extension_for_pytorch as ipex

    from zif_intel.ipex_attention import IpexAttention

    print(f"torch {torch.__version__}, IPEX {ipex.__version__}, {torch.get_num_threads()} threads")
    print(f"attention step, {HEADS} heads, {KV_HEADS} KV heads of {HEAD_DIM}: ms with IPEX, without, ratio")
    for dtype in ("float32", "bfloat16"):
        for case in CASES:
            steps = [attention_step(backend, case, dtype) for backend in (IpexAttention(), TiledAttention())]
            on, off = in_turns(steps, rounds)
            print(f"{dtype:9} {case.name:28} {on * 1e3:9.2f} {off * 1e3:9.2f} {off / on:7.2f} x")
    print("embedded model, 128 tokens in and 64 out, s with IPEX, without, ratio")
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 16):
            opened = [generation(setting, dtype, batch) for setting in ("on", "off")]
            on, off = in_turns([run for _, run in opened], rounds)
            for llm, _ in opened:
                llm.close()
            print(f"{dtype:9} batch {batch:<22} {on:9.3f} {off:9.3f} {off / on:7.2f} x")


if __name__ == "__main__":
    main()
