"""Simulated steps per second and core: the real scheduler and block manager, an invented runner, and every check.

What it is: how much a simulation proves in a given time. What it is not: the speed of the control plane alone, which
`scheduler.py` measures; here traffic, runner, oracle and checks are included. Two kinds of traffic:

    steady     8 requests live all the time, short prompts and 200 tokens of output on average, so nearly all decode
    campaign   what `zif simulate` runs: random scenarios of all kinds of layers, with faults, tiers and drafts

Three ways to check. In each of them texts, found prefixes, plans and progress are checked at every step in every row:

    all        at every step hands, census, each request's blocks, and the block manager's structures rebuilt
    default    as `CheckIntervals` has it, and `zif simulate`: structures rebuilt only every few steps
    sparse     all that looks at everything, only every 100th step

    python benchmarks/simulation.py --steps 20000 --repeats 5
    python benchmarks/simulation.py --breakdown

Prints a table, with ratios to floor and goal for steady traffic under the default checks, and, as the last line, the
same numbers as JSON. Times are processor time of this one thread, which other programs on the machine disturb least;
the median of the repeats counts.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from zif.contract import (
    EngineConfig,
    FullAttentionSpec,
    KVSpec,
    RecurrentStateSpec,
    SlidingWindowSpec,
    StateTensor,
    StepResult,
)
from zif.simulation import (
    Campaign,
    CheckIntervals,
    FaultSchedule,
    Scenario,
    Simulation,
    TrafficShape,
    Words,
    run_scenarios,
    simulated_arena,
)
from zif.simulation.scenario import VOCAB_SIZE

FLOOR, GOAL = 5_000, 20_000
"""Steps per second that steady traffic must reach, and should, under the default checks."""
INTERVALS = {"all": CheckIntervals(1, 1), "default": CheckIntervals(), "sparse": CheckIntervals(100, 100)}

_LIVE = 8
_BLOCK_SIZE = 16
_SLAB_WORDS = 2 * _BLOCK_SIZE
_SLABS = 112
"""As much as 8 requests of the longest kind need at once."""
_WARM_UP = 1000


def kinds() -> dict[str, tuple[KVSpec, ...]]:
    """Return the layer groups that are measured."""
    full = FullAttentionSpec((0,), 1, 8, _BLOCK_SIZE, "float32")
    sliding = SlidingWindowSpec((1,), 1, 8, _BLOCK_SIZE, "float32", window=64)
    state = RecurrentStateSpec((2,), (StateTensor("state", (8,), "float32"),), _BLOCK_SIZE, "float32")
    return {"full": (full,), "full + window": (full, sliding), "full + state": (full, state)}


def simulation(specs: tuple[KVSpec, ...], intervals: CheckIntervals, num_steps: int) -> Simulation:
    """Return a simulation that keeps 8 requests live for `num_steps` steps."""
    traffic = TrafficShape(
        num_arrivals=num_steps,
        arrival_rate=0.5,
        max_live=_LIVE,
        max_stem=32,
        max_tail=16,
        max_output=400,
        sample_counts=(1,),
        deadlines_s=(None,),
        continued_share=0.0,
    )
    config = EngineConfig(traffic.max_total_tokens, _LIVE, 256)
    arena = simulated_arena(specs, _SLABS * len(specs), _SLAB_WORDS)
    return Simulation(Scenario(0, arena, config, traffic), FaultSchedule(), Words(VOCAB_SIZE), intervals)


def steady(specs: tuple[KVSpec, ...], intervals: CheckIntervals, num_steps: int) -> float:
    """Return the steps per second of steady traffic; its first steps, while the places fill, are not counted."""
    run = simulation(specs, intervals, num_steps)
    run.run(_WARM_UP)
    start = time.process_time()
    run.run(_WARM_UP + num_steps)
    return num_steps / (time.process_time() - start)


def campaign(intervals: CheckIntervals, num_steps: int) -> float:
    """Return the steps per second of random scenarios."""
    start = time.process_time()
    run_scenarios(Campaign(0, num_steps, intervals=intervals))
    return num_steps / (time.process_time() - start)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both kinds of traffic under each way to check, in turns, and print a row for each."""
    cases: list[tuple[str, str, Callable[[CheckIntervals], float]]] = [
        ("steady", name, lambda intervals, specs=specs: steady(specs, intervals, options.steps))  # type: ignore[misc]
        for name, specs in kinds().items()
    ]
    cases.append(("campaign", "all kinds", lambda intervals: campaign(intervals, options.steps)))
    print(f"{'traffic':>9} {'layer groups':>14} {'checks':>8} {'steps/s':>9} {'of floor':>8} {'of goal':>8}")
    rows = []
    for traffic, groups, rate in cases:
        for checks, intervals in INTERVALS.items():
            rates = [rate(intervals) for _ in range(options.repeats)]
            median = statistics.median(rates)
            rows.append({"traffic": traffic, "groups": groups, "checks": checks, "steps_per_s": median, "all": rates})
            judged = traffic == "steady" and checks == "default"
            compared = f"{median / FLOOR:>8.2f} {median / GOAL:>8.2f}" if judged else ""
            print(f"{traffic:>9} {groups:>14} {checks:>8} {median:>9.0f} {compared}", flush=True)
    return rows


class Stopwatch:
    """Add up the seconds spent in methods, by name of the part of a step that they belong to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._own_s = self._own_cost()

    def watch(self, part: str, owner: object, *methods: str) -> None:
        """Time calls of an object's methods from now on."""
        for method in methods:
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds.setdefault(part, 0.0)

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.seconds[part] += time.process_time() - start - self._own_s

        return timed

    def _own_cost(self) -> float:
        self._own_s = 0.0
        nothing = self._timed("nothing", lambda: None)
        for _ in range(10_000):
            nothing()
        return self.seconds.pop("nothing") / 10_000


def breakdown(specs: tuple[KVSpec, ...], num_steps: int) -> dict[str, float]:
    """Return the microseconds of the parts of a step of steady traffic under default checks."""
    run = simulation(specs, INTERVALS["default"], num_steps)
    run.run(_WARM_UP)
    watch = Stopwatch()
    watch.watch("traffic", run._traffic, "arrivals")
    watch.watch("schedule()", run._scheduler, "schedule")
    watch.watch("checks of the plan", run._invariants, "check_plan", "check_victims", "check_progress")
    watch.watch("runner", run._runner, "submit")
    watch.watch("update()", run._scheduler, "update")
    watch.watch("checks of tokens and prefixes", run._invariants, "check_tokens", "note_computed")
    watch.watch("census", run._census, "count", "check_writes", "check_needs", "check_owned")
    watch.watch("structures rebuilt", run._blocks, "check_integrity")
    start = time.process_time()
    run.run(_WARM_UP + num_steps)
    total = time.process_time() - start
    parts = {part: seconds / num_steps * 1e6 for part, seconds in watch.seconds.items()}
    return {**parts, "all else": total / num_steps * 1e6 - sum(parts.values())}


def control_plane(specs: tuple[KVSpec, ...], num_steps: int) -> float:
    """Return the microseconds of schedule() and update() on steady traffic, with nothing else between them."""
    run = simulation(specs, INTERVALS["sparse"], num_steps)
    scheduler, traffic, spent = run._scheduler, run._traffic, 0.0
    for step in range(_WARM_UP + num_steps):
        for request in traffic.arrivals(0.0):
            scheduler.add(request)
        start = time.process_time()
        plan = scheduler.schedule()
        planned = time.process_time()
        if plan is None:
            continue
        result = StepResult(plan.step, [[step % VOCAB_SIZE] if samples else [] for samples in plan.samples])
        resumed = time.process_time()
        updates = scheduler.update(plan, result)
        if step >= _WARM_UP:
            spent += time.process_time() - resumed + planned - start
        for update in updates:
            if update.request.finished:
                traffic.heed(update.request)
    return spent / num_steps * 1e6


def print_breakdown(options: argparse.Namespace) -> None:
    """Print the parts of a step for every kind."""
    for name, specs in kinds().items():
        parts = breakdown(specs, options.steps)
        print(f"{name}: {sum(parts.values()):.1f} us a step; of that")
        for part, microseconds in parts.items():
            print(f"{part:>32} {microseconds:7.1f}")
        print(f"{'schedule() and update() alone':>32} {control_plane(specs, options.steps):7.1f}", flush=True)


def profile(num_steps: int) -> None:
    """Print where a simulation of the first kind spends its time under default checks."""
    run = simulation(kinds()["full"], INTERVALS["default"], num_steps)
    run.run(_WARM_UP)
    profiler = cProfile.Profile()
    profiler.runcall(run.run, _WARM_UP + num_steps)
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure and print the table and the JSON line, or what else was asked for."""
    parser = argparse.ArgumentParser(description="simulated steps per second and core")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--breakdown", action="store_true", help="print what the parts of a step take instead")
    parser.add_argument("--profile", action="store_true", help="profile the first kind instead")
    options = parser.parse_args()
    if options.profile:
        profile(options.steps)
    elif options.breakdown:
        print_breakdown(options)
    else:
        rows = measure(options)
        load = os.getloadavg()[0]
        print(json.dumps({"python": platform.python_version(), "live": _LIVE, "load": round(load, 1), "rows": rows}))


if __name__ == "__main__":
    main()
