"""Simulated steps per second and core with 8 live requests: the real scheduler and block manager, an invented runner.

What it is: how much a simulation proves in a given time. What it is not: the speed of the control plane alone, which
`scheduler.py` measures; here runner, oracle and checks are included. Requests of short prompts and 200 tokens of output
keep 8 places filled. Texts, found prefixes, plans and progress are checked at every step in every row; the checks that
look at everything (hands of all blocks, census rebuilt from scratch, what each request holds) run every k-th step.

    python benchmarks/simulation.py --steps 20000 --repeats 3

Prints a table and, as the last line, the same numbers as JSON. The repeat with the most steps per second counts.
"""

import argparse
import cProfile
import json
import platform
import pstats
import sys
import time

from zif.contract import EngineConfig, FullAttentionSpec, KVSpec, RecurrentStateSpec, SlidingWindowSpec, StateTensor
from zif.simulation import CheckIntervals, FaultSchedule, Scenario, Simulation, TrafficShape, Words, simulated_arena
from zif.simulation.scenario import VOCAB_SIZE

_LIVE = 8
_BLOCK_SIZE = 16
_SLABS = 160
_SLAB_WORDS = 2 * _BLOCK_SIZE


def kinds() -> dict[str, tuple[KVSpec, ...]]:
    """Return the layer groups that are measured."""
    full = FullAttentionSpec((0,), 1, 8, _BLOCK_SIZE, "float32")
    sliding = SlidingWindowSpec((1,), 1, 8, _BLOCK_SIZE, "float32", window=64)
    state = RecurrentStateSpec((2,), (StateTensor("state", (8,), "float32"),), _BLOCK_SIZE, "float32")
    return {"full": (full,), "full + window": (full, sliding), "full + state": (full, state)}


def simulation(specs: tuple[KVSpec, ...], every: int, num_steps: int) -> Simulation:
    """Return a simulation that keeps 8 requests running for `num_steps` steps."""
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
    return Simulation(Scenario(0, arena, config, traffic), FaultSchedule(), Words(VOCAB_SIZE), CheckIntervals(every))


def steps_per_second(specs: tuple[KVSpec, ...], every: int, num_steps: int) -> float:
    """Run one simulation; its first steps, while the places fill, are not counted."""
    run = simulation(specs, every, num_steps)
    run.run(1000)
    start = time.perf_counter()
    run.run(1000 + num_steps)
    return num_steps / (time.perf_counter() - start)


def profile(specs: tuple[KVSpec, ...], every: int, num_steps: int) -> None:
    """Print where one simulation spends its time."""
    run = simulation(specs, every, num_steps)
    run.run(1000)
    profiler = cProfile.Profile()
    profiler.enable()
    run.run(1000 + num_steps)
    profiler.disable()
    live = sum(not request.finished for request in run.requests)
    print(f"{live} live requests at the end")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure every kind at every interval and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description="simulated steps per second with 8 live requests")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 100], help="thorough checks every k-th step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="profile the first kind at the last interval instead")
    options = parser.parse_args()
    if options.profile:
        profile(kinds()["full"], options.every[-1], options.steps)
        return
    print(f"{'layer groups':>15} {'checks every':>13} {'steps/s':>9}")
    rows = []
    for name, specs in kinds().items():
        for every in options.every:
            best = max(steps_per_second(specs, every, options.steps) for _ in range(options.repeats))
            rows.append({"layer_groups": name, "checks_every": every, "steps_per_s": best})
            print(f"{name:>15} {every:>13} {best:>9.0f}")
    print(
        json.dumps({"python": platform.python_version(), "live_requests": _LIVE, "steps": options.steps, "rows": rows})
    )


if __name__ == "__main__":
    main()
