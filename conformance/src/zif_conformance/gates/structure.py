"""G0, structure: the proof that a comparison would see a fault, made on the reference before any device is judged.

A needle input hangs the whole answer on one key, row or slot. `proof` compares what the reference gives with what it
gives when that one is dropped, swapped, overwritten or stale: each must differ by more than 100 tolerances, or the test
would pass on a broken device.
"""

from collections.abc import Mapping, Sequence

import torch

from zif_conformance.gates.ratio import tolerance
from zif_conformance.gates.result import GateResult

TOLERANCES = 100.0


def proof(correct: torch.Tensor, allowed: torch.Tensor | float, faulty: Mapping[str, torch.Tensor]) -> GateResult:
    """Measure how well the least visible fault is hidden: 100 tolerances over its change; at most 1 may be reached.

    correct: [..., C], float64. allowed: the tolerance of each row. `faulty` are results with one fault each, by name.
    """
    measured, where = 0.0, "no fault"
    for name, result in faulty.items():
        change = (result.double() - correct.double()).abs().nan_to_num(nan=torch.inf)
        tolerances = float((change / allowed).max()) if change.numel() else 0.0
        hidden = TOLERANCES / tolerances if tolerances else torch.inf
        if hidden >= measured:
            measured, where = hidden, f"fault {name!r} changes the result by {tolerances:.3g} tolerances"
    return GateResult("G0", measured, 1.0, where)


def prove(
    correct: torch.Tensor, declared: Sequence[torch.Tensor], dtype: torch.dtype, faulty: Mapping[str, torch.Tensor]
) -> GateResult:
    """Make the proof with G3's tolerance. Raises `AssertionError` when a fault could stay unseen."""
    assert faulty, "a proof needs at least one fault"
    result = proof(correct, tolerance(correct, declared, dtype), faulty)
    assert result.passed, f"the input proves nothing: {result.message}"
    return result
