"""G3, ratio: reductions, matrix products and attention may be off by twice what the reference is off.

The reference runs in the dtypes that the device declares. Its error relative to the size of a row is pooled over the
rows, so that a row where it was right by luck does not tighten the gate; the limit of a row is that share of the row's
size, doubled, plus one rounding step of the output.
"""

from collections.abc import Sequence

import torch

from zif_conformance.gates.result import GateResult
from zif_conformance.gates.steps import rounding_step, worst

FACTOR = 2.0


def ratio(got: torch.Tensor, exact: torch.Tensor, declared: Sequence[torch.Tensor], what: str = "") -> GateResult:
    """Compare a result with float64; `declared` are runs of the reference in the declared dtypes."""
    if got.shape != exact.shape:
        return GateResult("G3", torch.inf, 0.0, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    if not exact.numel():
        return GateResult("G3", 0.0, 0.0, f"{what}: empty")
    wide, exact = got.detach().cpu().double(), exact.double()
    limit = tolerance(exact, declared, got.dtype).expand(exact.shape)
    error = (wide - exact).abs()
    at = worst(error, limit)
    row = at // exact.shape[-1]
    where = (
        f"{what}: row {row}, element {at % exact.shape[-1]} is {wide.flatten()[at]:.6g}, not {exact.flatten()[at]:.6g}"
    )
    measured = error.flatten()[at].nan_to_num(nan=torch.inf)
    return GateResult("G3", float(measured), float(limit.flatten()[at]), where)


def tolerance(exact: torch.Tensor, declared: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the allowed error of each row, [..., 1], float64."""
    size = exact.double().abs().amax(-1, keepdim=True)
    if not size.numel():
        return size
    shares = [
        ((run.double() - exact).abs().amax(-1, keepdim=True) / size).nan_to_num(0.0, 0.0).max() for run in declared
    ]
    return FACTOR * max(shares) * size + rounding_step(size, dtype)
