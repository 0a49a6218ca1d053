"""L2: what the bank of mutants showed to be missing: operands with strides, and norms in which epsilon counts."""

from typing import Any

import pytest
import torch

from zif.contract import Device
from zif_conformance.gates import exact, hold, ratio, ulp
from zif_conformance.marks import cases, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.operator_cases import OperatorCase, operator_cases
from zif_conformance.oracle.operators import device_run, exact_run, results_of

by_dtype = pytest.mark.parametrize("dtype", cases("dtype", "float32", "bfloat16", "float16"))

STRIDED = [case for case in operator_cases() if case.operator not in ("route", "experts") and "0x" not in case.name]


@conforms(level="L2", gate="G1", clause=("9.1", "9.2"), negative=True)
@by_dtype
@pytest.mark.parametrize("case", STRIDED, ids=lambda case: case.case_id)
def test_strides_do_not_matter(device: Device, dtype: str, case: OperatorCase, record_gate: Any) -> None:
    """The same values as rows of a wider tensor of NaN, on the device: a row read at the wrong place shows."""
    arguments = case.arguments(Inputs(dtype))
    dense = device_run(device.ops, device.array_device, case.operator, *arguments)
    first, *others = moved(arguments, lambda tensor: tensor.to(device.array_device, copy=True))
    assert isinstance(first, torch.Tensor)
    apart = results_of(getattr(device.ops, case.operator)(strided(first), *others))
    device.synchronize()
    for got, wanted in zip(apart, dense, strict=True):
        hold(record_gate, ratio(got.cpu().flatten(1), wanted.cpu().double().flatten(1), [wanted.cpu().flatten(1)]))


@conforms(level="L2", gate="G2", clause="9.1")
@by_dtype
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("size", [0.0, 1e-3, 3e-2])
def test_epsilon_counts_in_small_rows(device: Device, dtype: str, eps: float, size: float, record_gate: Any) -> None:
    """Rows whose mean square is about epsilon, or below: its value and its place in the formula show."""
    draw = Inputs(dtype)
    arguments = (draw.normal(5, 64, scale=size), draw.normal(64), eps, 0.0)
    (got,) = device_run(device.ops, device.array_device, "rms_norm", *arguments)
    (wanted,) = exact_run("rms_norm", *arguments)
    hold(record_gate, ulp(got.cpu(), wanted, 6 + 64 // 2))
    if size == 0.0:
        hold(record_gate, exact(got.cpu().abs(), torch.zeros_like(got.cpu()), "the norm of zeros"))
