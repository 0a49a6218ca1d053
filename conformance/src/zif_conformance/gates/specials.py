"""G6, special values: NaN, infinities and the sign of zero come out where the reference says, and nowhere else."""

import torch

from zif_conformance.gates.result import GateResult

_KINDS = ("finite", "zero", "negative zero", "infinity", "negative infinity", "NaN")


def specials(got: torch.Tensor, expected: torch.Tensor, what: str = "", *, signed_zero: bool = False) -> GateResult:
    """Count the elements of another kind than expected: finite, NaN, either infinity, and either zero if asked."""
    if got.shape != expected.shape:
        where = f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        return GateResult("G6", float(max(1, expected.numel())), 0.0, where)
    found, wanted = _kinds(got.detach().cpu(), signed_zero), _kinds(expected, signed_zero)
    places = (found != wanted).flatten().nonzero().flatten().tolist()
    where = what
    if places:
        at = places[0]
        where = f"{what}: element {at} is {_KINDS[int(found.flatten()[at])]}, not {_KINDS[int(wanted.flatten()[at])]}"
    return GateResult("G6", float(len(places)), 0.0, where)


def _kinds(tensor: torch.Tensor, signed_zero: bool) -> torch.Tensor:
    kinds = torch.zeros(tensor.shape, dtype=torch.int64)
    if signed_zero:
        kinds[tensor == 0] = 1
        kinds[(tensor == 0) & tensor.signbit()] = 2
    kinds[tensor.isposinf()] = 3
    kinds[tensor.isneginf()] = 4
    kinds[tensor.isnan()] = 5
    return kinds
