"""G2, rounding steps: elementwise operators may be off by what their operations round, and no more.

The bound is half a step of the output plus one step of the compute dtype for each operation that rounds, as WebNN
derives its own (W3C, Web Neural Network API, operator tolerances).
"""

import torch

from zif_conformance.gates.result import GateResult
from zif_conformance.gates.steps import rounding_step, worst

_OUTPUT_STEPS = 0.51
"""Half a step, and what double rounding through the compute dtype may add."""


def ulp(
    got: torch.Tensor,
    exact: torch.Tensor,
    roundings: int,
    magnitude: torch.Tensor | None = None,
    compute: torch.dtype = torch.float32,
    inherited: torch.Tensor | float = 0.0,
) -> GateResult:
    """Compare an elementwise result with float64, where `roundings` operations in `compute` lead to it.

    `magnitude` is the size of the terms that were added, where they may cancel (default: the result's own size).
    `inherited` is how far off each element may be since its operands were results themselves.
    """
    if got.shape != exact.shape:
        return GateResult("G2", torch.inf, 1.0, f"shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    if not exact.numel():
        return GateResult("G2", 0.0, 1.0, "empty")
    wide, exact = got.detach().cpu().double(), exact.double()
    size = exact.abs() if magnitude is None else torch.maximum(magnitude.double().abs(), exact.abs())
    limit = _OUTPUT_STEPS * rounding_step(exact, got.dtype) + roundings * rounding_step(size, compute) + inherited
    error = torch.where(wide == exact, 0.0, (wide - exact).abs())
    at = worst(error, limit)
    where = f"element {at} of {exact.numel()} is {wide.flatten()[at]:.9g}, not {exact.flatten()[at]:.9g}"
    return GateResult("G2", float(error.flatten()[at]), float(limit.flatten()[at]), where)
