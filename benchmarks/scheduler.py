"""Time of the control plane alone: one `schedule()` and one `update()` with every request decoding.

What it is: the host's share of a step, which a fast device would wait for. What it is not: a measure of the engine;
no runner computes, the results are prepared before the clock starts. A step of N decoding requests does N times the
same few list operations; once every `block_size` steps a request also takes a block and hashes the one that it filled.
Nothing grows with the number of tokens that a request has.

    python benchmarks/scheduler.py --steps 200 --repeats 5

Prints a table and, as the last line, the same numbers as JSON. The clock of a shared machine is noisy: each case is
repeated and the repeat with the smallest median counts.
"""

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import sys
import time
from dataclasses import asdict, dataclass

from zif.contract import EngineConfig, FullAttentionSpec, KVGroup, Request, SamplingParams, StepResult, slab_arena
from zif.kv import PagedBlockManager
from zif.null.platform import null_layout
from zif.scheduling import TokenBudgetScheduler

_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `num_requests` decode for `num_steps` steps after prompts of `prompt_tokens` tokens."""

    num_requests: int
    prompt_tokens: int
    block_size: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one `schedule()` and one `update()` together."""

    num_requests: int
    median_us: float
    p90_us: float
    median_us_per_request: float


def decoding_scheduler(case: Case) -> TokenBudgetScheduler:
    """Return a scheduler whose requests have all computed their prompts."""
    max_tokens = case.prompt_tokens + case.num_steps + 2
    config = EngineConfig(max_tokens, case.num_requests, case.num_requests * case.prompt_tokens)
    spec = FullAttentionSpec(tuple(range(32)), 8, 128, case.block_size, "bfloat16")
    group = KVGroup(spec, null_layout(spec))
    num_blocks = case.num_requests * -(-max_tokens // case.block_size) + 1
    arena = slab_arena(num_blocks * group.layout.block_bytes, [group])
    blocks = PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=config.max_num_batched_tokens)
    scheduler = TokenBudgetScheduler(config, blocks)
    for index in range(case.num_requests):
        # Lengths differ by a block, so that block boundaries are spread over the steps as in real traffic.
        num_tokens = case.prompt_tokens - index % case.block_size
        prompt = [(index * 7919 + position) % _VOCAB_SIZE for position in range(num_tokens)]
        scheduler.add(Request(index, prompt, num_tokens, SamplingParams(), max_total_tokens=max_tokens, arrival=index))
    step(scheduler, prepared_result(case.num_requests))
    return scheduler


def prepared_result(num_requests: int) -> StepResult:
    """Return a result that samples one token for every request."""
    return StepResult(0, [[index % _VOCAB_SIZE] for index in range(num_requests)])


def step(scheduler: TokenBudgetScheduler, result: StepResult) -> float:
    """Schedule and update once; return the microseconds that it took."""
    start = time.perf_counter()
    plan = scheduler.schedule()
    assert plan is not None, "a decoding request can always be scheduled"
    result.step = plan.step
    updates = scheduler.update(plan, result)
    elapsed_us = (time.perf_counter() - start) * 1e6
    assert len(updates) == len(result.sampled), "a request was left out of the step"
    return elapsed_us


def measure(case: Case) -> Timing:
    """Time every step of one run."""
    scheduler, result = decoding_scheduler(case), prepared_result(case.num_requests)
    times = [step(scheduler, result) for _ in range(case.num_steps)]
    median = statistics.median(times)
    return Timing(case.num_requests, median, statistics.quantiles(times, n=10)[-1], median / case.num_requests)


def profile(case: Case) -> None:
    """Print where one run spends its time."""
    scheduler, result = decoding_scheduler(case), prepared_result(case.num_requests)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(case.num_steps):
        step(scheduler, result)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(15)


def main() -> None:
    """Measure every size and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="time schedule() and update() with every request decoding")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="profile the largest size instead")
    options = parser.parse_args()
    cases = [Case(n, options.prompt_tokens, options.block_size, options.steps) for n in options.requests]
    if options.profile:
        profile(cases[-1])
        return
    print(f"{'requests':>9} {'median us':>11} {'p90 us':>11} {'us/request':>11}")
    timings = []
    for case in cases:
        best = min((measure(case) for _ in range(options.repeats)), key=lambda timing: timing.median_us)
        timings.append(best)
        print(
            f"{best.num_requests:>9} {best.median_us:>11.1f} {best.p90_us:>11.1f} {best.median_us_per_request:>11.3f}"
        )
    setting = {"prompt_tokens": options.prompt_tokens, "block_size": options.block_size, "steps": options.steps}
    print(json.dumps({"python": platform.python_version(), **setting, "timings": [asdict(t) for t in timings]}))


if __name__ == "__main__":
    main()
