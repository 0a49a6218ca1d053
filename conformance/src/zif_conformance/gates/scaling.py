"""G5, scaling: what has a length keeps its gate at every length, and its error grows like the square root at most."""

import math
from collections.abc import Mapping

from zif_conformance.gates.result import GateResult

_GROWTH = 4.0


def borders(block: int, longest: int) -> tuple[int, ...]:
    """Return the lengths at which things go wrong, up to `longest`: around one and two blocks, and powers of two."""
    powers = (2**k for k in range(longest.bit_length()))
    around = (1, block - 1, block, block + 1, 2 * block - 1, 2 * block, 2 * block + 1, longest - 1, longest)
    return tuple(sorted({length for length in (*around, *powers) if 1 <= length <= longest}))


def scaling(results: Mapping[int, GateResult]) -> GateResult:
    """Judge the same comparison at several lengths. Raises `ValueError` on fewer than two.

    Measured is the share of the gate that the worst length uses, or of 4 times the square root of the length times the
    error that the shortest was allowed, whichever is more; either may be 1.
    """
    if len(results) < 2:
        raise ValueError(f"{len(results)} lengths say nothing about growth; give at least two")
    shortest = min(results)
    start = results[shortest]
    base = max(start.measured, start.limit)
    measured, where = 0.0, "every length"
    for length, result in sorted(results.items()):
        growth_limit = _GROWTH * math.sqrt(length / shortest) * base
        share = max(_share(result.measured, result.limit), _share(result.measured, growth_limit))
        if not share <= measured:
            measured, where = share, f"length {length}: {result.where}"
    return GateResult("G5", measured, 1.0, where)


def _share(measured: float, limit: float) -> float:
    """Return how much of a limit is used."""
    if measured == 0:
        return 0.0
    return measured / limit if limit else math.inf
