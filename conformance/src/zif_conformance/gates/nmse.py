"""G4, normalized mean squared error: quantized results against a reference that quantizes in the same way."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from zif_conformance.gates.result import GateResult

NMSE_LIMITS: Mapping[str, float] = MappingProxyType(
    {"float32": 1e-7, "float16": 5e-5, "bfloat16": 5e-3, "int8": 5e-4, "fp8": 2e-3, "fp4": 2e-2}
)
"""By the dtype in which the operands are kept. From ggml's test-backend-ops, but for fp8."""


def nmse(got: torch.Tensor, expected: torch.Tensor, stored: str) -> GateResult:
    """Compare the energy of the error with that of the expectation. Raises `KeyError` on a dtype without a limit."""
    limit = NMSE_LIMITS[stored]
    if got.shape != expected.shape:
        return GateResult("G4", torch.inf, limit, f"shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    wide, expected = got.detach().cpu().double(), expected.double()
    energy = float(expected.square().sum())
    error = float((wide - expected).square().sum().nan_to_num(nan=torch.inf))
    measured = error / energy if energy else (0.0 if error == 0 else torch.inf)
    return GateResult("G4", measured, limit, f"{stored}, {expected.numel()} elements")


def nmse_of_rows(got: torch.Tensor, expected: torch.Tensor, stored: str) -> GateResult:
    """Compare the energy of the worst row's error with that of a row on average: one wrong row of many is seen.

    got, expected: [rows, columns], rows of about one size. A row that cancels is held to the size of the others.
    """
    limit = NMSE_LIMITS[stored]
    if got.shape != expected.shape or not expected.numel():
        return nmse(got, expected, stored)
    expected = expected.double()
    errors = (got.detach().cpu().double() - expected).square().sum(-1).nan_to_num(nan=torch.inf)
    energy = float(expected.square().sum(-1).mean())
    row = int(errors.argmax())
    measured = float(errors[row]) / energy if energy else (torch.inf if errors.any() else 0.0)
    return GateResult("G4", measured, limit, f"{stored}, row {row} of {len(expected)}")
