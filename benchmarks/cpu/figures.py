"""Figures of one run, and medians of several: the arithmetic between clocks and tables.

Times are seconds, rates are output tokens per second. A percentile is the smallest value that at least so many percent
of the values do not exceed.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cpu.workloads import Workload


def figures_of(workload: Workload, token_s: Sequence[Sequence[float]], wall_s: float) -> dict[str, float | int | None]:
    """Return the figures of a workload from the times of its tokens, counted from the start of the workload."""
    first = [times[0] - request.arrival_s for times, request in zip(token_s, workload.requests, strict=True)]
    gaps = [later - earlier for times in token_s for earlier, later in pairwise(times)]
    return {
        "wall_s": round(wall_s, 4),
        "tokens_per_s": round(workload.num_output / wall_s, 3),
        "decode_tokens_per_s": decode_rate(token_s),
        "first_token_p50_s": round(percentile(first, 50), 4),
        "first_token_p99_s": round(percentile(first, 99), 4),
        "gap_p50_s": round(percentile(gaps, 50), 5) if gaps else None,
        "gap_p99_s": round(percentile(gaps, 99), 5) if gaps else None,
    }


def decode_rate(token_s: Sequence[Sequence[float]]) -> float | None:
    """Return the rate after every request has its first token; None when less than two tokens came after that."""
    begin = max(times[0] for times in token_s)
    later = [moment for times in token_s for moment in times if moment > begin]
    span = max(later, default=begin) - begin
    return round(len(later) / span, 3) if len(later) > 1 and span > 0 else None


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile. Raises `ValueError` without values."""
    if not values:
        raise ValueError("a percentile needs values")
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median_of(entries: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return the median of what entries have under a key, or None when none has anything there."""
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return statistics.median(values) if values else None


def spread_of(entries: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return (largest - smallest) / median under a key; None for less than two values."""
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def ratio(one: float | None, other: float | None) -> float | None:
    """Return one / other where both are known."""
    return one / other if one and other else None
