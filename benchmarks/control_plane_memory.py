"""What the control plane costs in memory: bytes per cached block, and whether anything grows with the requests served.

The physics: per cell of the arena a reference count, two links, a line number and a 64-bit key, and at most half full
hash table, in flat arrays (49 bytes at most); per cached block its content, the parent's digest and the tokens (129
bytes for 16 tokens). Python's own objects would be several times that: a dictionary entry takes about 100 bytes.

First part: prompts of 1,024 tokens fill a cache of 100,000 blocks, then traced memory over cached blocks, everything
counted. Floor: under 200 bytes. Second part: scheduler and block manager serve N requests, no two alike, with aborts,
preemptions, wishes for retention and a tenant with a quota, in an arena that is always full. Traced memory is taken at
ten checkpoints with nothing under way but what is always there; the last may not exceed the first by more than 10 %.

    python benchmarks/control_plane_memory.py
    python benchmarks/control_plane_memory.py --requests 1000000
"""

import argparse
import gc
import json
import random
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

from zif.contract import (
    EngineConfig,
    FinishReason,
    FullAttentionSpec,
    KVArena,
    KVGroup,
    Request,
    Retention,
    SamplingParams,
    SlidingWindowSpec,
    StepResult,
    slab_arena,
)
from zif.kv import PagedBlockManager, Retainer
from zif.null.platform import null_layout
from zif.scheduling import TokenBudgetScheduler

BLOCK_SIZE, PROMPT_BLOCKS, VOCAB_SIZE = 16, 64, 50_000
FLOOR_BYTES, MAX_GROWTH, NUM_CHECKPOINTS = 200, 1.1, 10
FULL = FullAttentionSpec((0,), 1, 8, BLOCK_SIZE, "float32")
WINDOW = SlidingWindowSpec((1,), 1, 8, BLOCK_SIZE, "float32", window=48)
MAX_LIVE, ARENA_BLOCKS = 16, 90


def arena_of(num_blocks: int, *specs: FullAttentionSpec | SlidingWindowSpec) -> KVArena:
    groups = [KVGroup(spec, null_layout(spec)) for spec in specs]
    return slab_arena(num_blocks * groups[0].layout.block_bytes, groups)


def bytes_per_block(num_blocks: int) -> float:
    """Fill a cache with prompts that have nothing in common, and return what is traced over its blocks."""
    gc.collect()
    tracemalloc.start()
    arena = arena_of(num_blocks + 2, FULL)
    blocks = PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=PROMPT_BLOCKS * BLOCK_SIZE)
    for number in range(num_blocks // PROMPT_BLOCKS):
        chance = random.Random(number)
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(PROMPT_BLOCKS * BLOCK_SIZE)]
        request = Request(number, prompt, len(prompt), SamplingParams(), max_total_tokens=len(prompt) + 1)
        blocks.begin(request)
        assert blocks.reserve(request, len(prompt)), "the arena is too small for the benchmark"
        request.num_computed_tokens = len(prompt)
        blocks.commit(request)
        blocks.release(request)
    del request, prompt, chance
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_cached = blocks.usage()[0].num_cached
    assert num_cached == num_blocks // PROMPT_BLOCKS * PROMPT_BLOCKS, "a block is missing"
    return traced / num_cached


@dataclass(slots=True)
class Served:
    """What happened so far."""

    num_requests: int = 0
    num_aborted: int = 0
    num_preemptions: int = 0


class Server:
    """Scheduler and block manager under traffic that never repeats itself."""

    def __init__(self) -> None:
        arena = arena_of(ARENA_BLOCKS, FULL, WINDOW)
        config = EngineConfig(512, MAX_LIVE, 256, expected_output_percent=0, tenant_cache_percent=(("a", 20),))
        retainer = Retainer(lambda: self.now_s, config.tenant_cache_percent)
        blocks = PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=256, retainer=retainer)
        self.now_s = 0.0
        self.served = Served()
        self._blocks = blocks
        self._scheduler = TokenBudgetScheduler(config, blocks, clock=lambda: self.now_s)
        self._chance = random.Random(0)
        self._live: dict[int, Request] = {}

    def serve(self, num_requests: int) -> None:
        """Serve so many more requests, and end with none live."""
        goal = self.served.num_requests + num_requests
        while self.served.num_requests < goal or self._live:
            while len(self._live) < MAX_LIVE + 4 and self.served.num_requests < goal:
                self._add()
            self._step()
        while self._scheduler.has_requests():
            self._step()

    def _add(self) -> None:
        number, chance = self.served.num_requests, self._chance
        prompt = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(8, 100))]
        wish = Retention(chance.choice((20, 80)), end=64, duration_s=chance.choice((None, 3.0, 1e9)))
        request = Request(
            number,
            prompt,
            len(prompt),
            SamplingParams(),
            max_total_tokens=len(prompt) + chance.randrange(1, 16),
            arrival=number,
            tenant=chance.choice(("", "a", "b")),
            retention=(wish,) if number % 5 == 0 else (),
        )
        self._live[number] = request
        self._scheduler.add(request)
        self.served.num_requests += 1

    def _step(self) -> None:
        self.now_s += 0.01
        plan = self._scheduler.schedule()
        if plan is not None:
            sampled = [[self._chance.randrange(VOCAB_SIZE)] if samples else [] for samples in plan.samples]
            for update in self._scheduler.update(plan, StepResult(plan.step, sampled)):
                if update.request.finished:
                    self._forget(update.request)
        if self._live and self._chance.random() < 0.1:
            number = self._chance.choice(list(self._live))
            ended = self._scheduler.finish(number, FinishReason.ABORT)
            if ended is not None:
                self.served.num_aborted += 1
                self._forget(ended)

    def _forget(self, request: Request) -> None:
        self._live.pop(request.request_id, None)
        self.served.num_preemptions += request.num_preemptions


def growth(num_requests: int) -> tuple[list[int], Served]:
    """Serve `num_requests` requests; return the bytes traced at each checkpoint, and what happened."""
    gc.collect()
    tracemalloc.start()
    server = Server()
    server.serve(2000)
    checkpoints = []
    for _ in range(NUM_CHECKPOINTS):
        server.serve(num_requests // NUM_CHECKPOINTS)
        gc.collect()
        checkpoints.append(tracemalloc.get_traced_memory()[0])
        print(f"{server.served.num_requests:>9,} requests: {checkpoints[-1]:>9,} bytes traced", flush=True)
    tracemalloc.stop()
    return checkpoints, server.served


def main() -> None:
    parser = argparse.ArgumentParser(description="bytes per cached block, and growth with the requests served")
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    per_block = bytes_per_block(arguments.blocks)
    print(f"{per_block:.1f} bytes per cached block of {BLOCK_SIZE} tokens (floor: under {FLOOR_BYTES})", flush=True)
    checkpoints, served = growth(arguments.requests)
    ratio = checkpoints[-1] / checkpoints[0]
    print(
        f"last over first checkpoint: {ratio:.3f} (bound {MAX_GROWTH}); {served.num_aborted:,} aborts, "
        f"{served.num_preemptions:,} preemptions"
    )
    print(json.dumps({"bytes_per_block": per_block, "checkpoints": checkpoints, "file": Path(__file__).name}))
    if per_block >= FLOOR_BYTES or ratio > MAX_GROWTH:
        raise SystemExit("a bound is broken")


if __name__ == "__main__":
    main()
