"""What the tests of operators share: their marks, a call on the device, and its arguments afterwards. No test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from zif.contract import Device, QuantizedWeight
from zif.errors import ZifError
from zif_conformance.gates import GateResult, exact, guarded, hold
from zif_conformance.marks import cases, exercises
from zif_conformance.oracle.inputs import moved
from zif_conformance.oracle.operators import device_run
from zif_conformance.oracle.quantization import DrawnWeight
from zif_conformance.oracle.quantized_cases import SCHEMES, ExpertsCase, GatedCase, ProductCase
from zif_conformance.subject import Subject

DTYPES = ("float32", "bfloat16", "float16")
REFUSALS = (ValueError, RuntimeError, IndexError, TypeError, AssertionError, ZifError)
"""The contract names no class for a caller's mistake; these are what array libraries raise."""

SPOILT: dict[str, Callable[[torch.Tensor, QuantizedWeight, torch.Tensor], tuple[object, ...]]] = {
    "inner-size": lambda x, weight, bias: (x[:, :-2], weight, bias),
    "bias-size": lambda x, weight, bias: (x, weight, bias[1:]),
    "scale-rows": lambda x, weight, bias: (x, replace(weight, scales=weight.scales[1:]), bias),
    "scale-groups": lambda x, weight, bias: (x, replace(weight, scales=weight.scales.repeat(1, 2)), bias),
    "code-rows": lambda x, weight, bias: (x, replace(weight, codes=weight.codes[1:]), bias),
}
"""Arguments of a quantized product of shapes that do not fit."""

by_dtype = pytest.mark.parametrize("dtype", cases("dtype", *DTYPES))


def by_scheme(*names: str) -> pytest.MarkDecorator:
    """Return a mark that runs a test for schemes whose feature is claimed (none named: all)."""
    chosen = names or tuple(SCHEMES)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=exercises(SCHEMES[name].feature), id=name) for name in chosen]
    )


def by_case(found: Sequence[ProductCase] | Sequence[GatedCase] | Sequence[ExpertsCase]) -> pytest.MarkDecorator:
    """Return a mark that runs a test for cases whose feature is claimed."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=exercises(case.scheme.feature), id=case.case_id) for case in found]
    )


def run_one(device: Device, operator: str, *arguments: object) -> torch.Tensor:
    """Return the one result of an operator, on the host."""
    (result,) = device_run(device.ops, device.array_device, operator, *arguments)
    device.synchronize()
    return result.cpu()


def run_if_served(device: Device, operator: str, *arguments: object) -> torch.Tensor | None:
    """Return the result of an operator that may leave its work to another one, on the host; None where it does."""
    got = getattr(device.ops, operator)(*moved(arguments, lambda tensor: tensor.to(device.array_device, copy=True)))
    device.synchronize()
    return None if got is None else got.cpu()


def note_left(record_gate: Any, operator: str, other: str) -> None:
    """Record that the platform leaves an operator's work to another one, which the contract allows."""
    hold(record_gate, GateResult("G1", 0.0, 0.0, f"left to {other}: {operator} answers None"))


def check_always_or_never(answers: Mapping[Any, torch.Tensor | None], record_gate: Any) -> None:
    """Hold an operator to answer all calls or none. answers: by what tells a call from the others."""
    left = [call for call, answer in answers.items() if answer is None]
    answered = [call for call, answer in answers.items() if answer is not None]
    few = min(answered, left, key=len)
    where = f"of {len(answers)} calls those that are answered otherwise than most: {few[:3]}"
    hold(record_gate, GateResult("G1", len(few), 0.0, where))


def check_batches(subject: Subject, run: Callable[[Device, slice], torch.Tensor], record_gate: Any) -> None:
    """Hold rows of a batch of 40 to be, to the bit, those of smaller ones, where the batch is to have no influence."""
    with subject.opened(subject.workload(batch_invariant=True)) as device:
        together = run(device, slice(0, 40))
        for begin, end in ((0, 1), (39, 40), (7, 8), (3, 5), (20, 37), (0, 32)):
            got = run(device, slice(begin, end))
            hold(record_gate, exact(got, together[begin:end], f"rows {begin} to {end - 1} of 40"))


def stored(dtype: str, weight: DrawnWeight) -> str:
    """Name what the operands are kept in, by which the gate has its limit; exact codes of a weight cost nothing."""
    return "int8" if weight.scheme.dynamic_activations else dtype


def check_untouched(device: Device, operator: str, arguments: tuple[object, ...], record_gate: Any) -> None:
    """Hold an operator to leave alone its arguments and the memory around them."""
    guards = []

    def guard(tensor: torch.Tensor) -> torch.Tensor:
        guards.append((guarded(tensor, device.array_device), tensor))
        return guards[-1][0].tensor

    getattr(device.ops, operator)(*moved(arguments, guard))
    device.synchronize()
    for index, (kept, before) in enumerate(guards):
        hold(record_gate, kept.untouched(f"argument {index}"), exact(kept.tensor, before, f"argument {index}"))
