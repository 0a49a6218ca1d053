"""Does the control plane grow without bound? A million ever-new requests, every container counted.

What it is: the real scheduler and block manager under `zif.simulation.growth`'s traffic: new tokens, salts, tenants,
deadlines and wishes for retention in every request, aborts, preemptions, conversations, two memory tiers. After every
two-hundredth of the requests the object graph of scheduler and block manager is walked and the entries of every
container are counted, by the way that leads to it. What it is not: a measure of the memory of a block, or of speed.

    python benchmarks/growth.py --requests 1000000
    python benchmarks/growth.py --requests 100000 --trace-memory

Prints, at ten checkpoints, the largest size since the one before: of each container that was ever longer than 32, and
of the memory. Memory is what Python's allocator holds for the whole process in blocks of up to 512 bytes, their number;
with --trace-memory (twice as slow) the bytes that Python code has allocated. Fails if anything is larger in the second
half than in the first, by more than a quarter and 64 entries (of memory, a tenth).
"""

import argparse
import gc
import json
import sys
import time
import tracemalloc

from zif.simulation.growth import Churn, container_sizes, grown

_CHECKPOINTS = 10
_SAMPLES_PER_CHECKPOINT = 20
_MIN_SHOWN = 32
_MEMORY = "memory"
_MAX_MEMORY_GROWTH = 0.1


def sizes(churn: Churn) -> dict[str, int]:
    """Count the entries of all containers, and the memory."""
    gc.collect()
    counted = container_sizes({"scheduler": churn.scheduler, "blocks": churn.blocks})
    used = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else sys.getallocatedblocks()
    return {**counted, _MEMORY: used}


def largest(samples: list[dict[str, int]]) -> dict[str, int]:
    """Return the largest size of each container over several samples."""
    return {way: max(sample.get(way, 0) for sample in samples) for sample in samples for way in sample}


def checkpoints(churn: Churn, num_requests: int) -> list[dict[str, int]]:
    """Let the requests come, and return the largest sizes between checkpoints."""
    points = []
    for point in range(_CHECKPOINTS):
        samples = []
        for sample in range(point * _SAMPLES_PER_CHECKPOINT, (point + 1) * _SAMPLES_PER_CHECKPOINT):
            churn.run((sample + 1) * num_requests // (_CHECKPOINTS * _SAMPLES_PER_CHECKPOINT))
            samples.append(sizes(churn))
        points.append(largest(samples))
        print(f"{churn.num_requests} requests, {points[-1][_MEMORY]} of memory", file=sys.stderr, flush=True)
    return points


def broken(points: list[dict[str, int]]) -> list[str]:
    """Name what has grown."""
    half = len(points) // 2
    first, second = largest(points[:half]), largest(points[half:])
    before, after = first.pop(_MEMORY), second.pop(_MEMORY)
    found = grown(first, second)
    if after > before * (1 + _MAX_MEMORY_GROWTH):
        found.append(f"{_MEMORY}: {before}, then {after}")
    return found


def print_table(points: list[dict[str, int]]) -> None:
    """Print a line for each container of some length, the longest first."""
    peaks = largest(points)
    shown = [way for way in peaks if peaks[way] > _MIN_SHOWN]
    for way in sorted(shown, key=lambda way: -peaks[way]):
        print(" ".join(f"{point.get(way, 0):>8}" for point in points), way)
    print(f"and {len(peaks) - len(shown)} containers of at most {_MIN_SHOWN} entries")


def main() -> int:
    """Run, print the table and, as the last line, a summary as JSON; return 1 when something has grown."""
    parser = argparse.ArgumentParser(description="count every container of the control plane over many requests")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace-memory", action="store_true", help="trace bytes; twice as slow")
    options = parser.parse_args()
    if options.trace_memory:
        tracemalloc.start()
    start = time.perf_counter()
    churn = Churn(options.seed)
    points = checkpoints(churn, options.requests)
    churn.drain()
    print_table(points)
    faults = broken(points)
    for fault in faults:
        print(f"grown: {fault}")
    summary = {
        "requests": churn.num_requests,
        "ends": churn.ends,
        "preemptions": churn.num_preemptions,
        "containers": len(points[-1]) - 1,
        "memory": [point[_MEMORY] for point in points],
        "seconds": round(time.perf_counter() - start),
        "grown": faults,
    }
    print(json.dumps(summary))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
