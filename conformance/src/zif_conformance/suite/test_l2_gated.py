"""L2: products of gates and ups in one operator: whose gate meets whose up, weights held as integers, and batches.

Values of weights in the model's dtype, strides and NaN are those of every operator, in `test_l2_ops`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from zif.contract import Activation, Device, QuantizedWeight
from zif_conformance.gates import exact, hold, nmse_of_rows, ratio
from zif_conformance.marks import Safety, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.operators import declared_run
from zif_conformance.oracle.quantization import (
    DrawnWeight,
    declared_product,
    draw_weight,
    exact_gated,
)
from zif_conformance.oracle.quantized_cases import SCHEMES, GatedCase, gated_cases
from zif_conformance.subject import Subject
from zif_conformance.suite.operator_calls import (
    REFUSALS,
    SPOILT,
    by_case,
    by_dtype,
    by_scheme,
    check_batches,
    check_untouched,
    run_one,
    stored,
)

CASES = gated_cases()
FEW_CASES = [case for case in CASES if case.product.tokens in (0, 3)]


@conforms(level="L2", gate="G1", clause="9.10")
@by_dtype
@pytest.mark.parametrize("place", [0, 1, 63, 64, 511, 512])
def test_each_gate_meets_its_own_up(device: Device, dtype: str, place: int, record_gate: Any) -> None:
    """Gates are powers of two, of the bias alone, large enough that SILU keeps them; ups are one column: all exact."""
    draw = Inputs(dtype)
    x, weight = torch.zeros(5, 513, dtype=draw.dtype), draw.normal(2 * 37, 513)
    x[:, place] = draw.signs(5)
    weight[:37] = 0.0
    gates = 2.0 ** (6 + torch.arange(37) % 4)
    bias = torch.cat((gates, torch.zeros(37))).to(draw.dtype)
    got = run_one(device, "gated_linear", x, weight, bias, Activation.SILU)
    wanted = x[:, place, None].double() * weight[37:, place].double() * gates
    hold(record_gate, exact(got + 0.0, wanted.to(draw.dtype) + 0.0, f"column {place}"))


@conforms(level="L2", gate="G4", clause=("9.1", "9.3", "9.6", "9.10"))
@by_dtype
@by_case(CASES)
def test_value_of_codes(device: Device, dtype: str, case: GatedCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    got = _gated(device, call.x, call.weight, call.bias, case.activation)
    wanted = exact_gated(call.x, call.weight, call.bias, case.activation)
    assert got.dtype == call.x.dtype, "the result has another dtype than x"
    hold(record_gate, nmse_of_rows(got, wanted, stored(dtype, call.weight)))


@conforms(level="L2", gate="G3", clause=("9.6", "9.7", "9.10"))
@by_dtype
@by_scheme()
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.SWIGLU_CLAMPED])
def test_codes_that_are_beyond_doubt(
    device: Device, dtype: str, name: str, activation: Activation, record_gate: Any
) -> None:
    """Inputs that are codes times a power of two: what is left is an error of sums, and of what is gated."""
    draw = Inputs(dtype)
    inner = 5 * (SCHEMES[name].group_size or 26)
    x = draw.integers(-127, 128, 7, inner)
    x[:, 3] = 127
    x = (x / 64.0).to(draw.dtype)
    weight, bias = draw_weight(draw, SCHEMES[name], 66, inner), draw.normal(66)
    (declared,) = declared_run("gated_activation", declared_product(x, weight, bias), activation)
    got = _gated(device, x, weight, bias, activation)
    hold(record_gate, ratio(got, exact_gated(x, weight, bias, activation), [declared], "on codes"))


@conforms(level="L2", gate="G1", clause=("9.2", "9.10"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_case(FEW_CASES)
def test_nothing_around_arguments_is_written(device: Device, dtype: str, case: GatedCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    arguments = call.x, call.weight.held(), call.bias, case.activation
    check_untouched(device, "gated_linear", arguments, record_gate)


@conforms(level="L2", gate="G6", clause=("9.6", "9.7", "9.10"), negative=True)
@by_dtype
@by_scheme()
def test_what_is_not_finite_shows_in_its_row_alone(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    draw = Inputs(dtype)
    x, weight, bias = _arguments(draw, name, 7, 35)
    clean = _gated(device, x, weight, bias, Activation.SILU)
    x[1, 1], x[2, -1], x[5, 0] = math.nan, math.inf, -math.inf
    dirty = _gated(device, x, weight, bias, Activation.SILU)
    others = [0, 3, 4, 6]
    hold(record_gate, exact(dirty[others], clean[others], "the other rows"))
    assert not dirty[[2, 5]].isfinite().any(), "an infinity was swallowed"
    assert dirty[1].isnan().all(), "a NaN was swallowed"


@conforms(level="L2", gate="G3", clause=("9.3", "9.6", "9.10"), negative=True)
@by_dtype
@by_scheme()
def test_strides_do_not_matter(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """The same values as rows of a wider tensor of NaN, on the device: a row read at the wrong place shows."""
    x, weight, bias = _arguments(Inputs(dtype), name, 19, 30)
    dense = _gated(device, x, weight, bias, Activation.GELU)
    arguments = x, weight.held(), bias, Activation.GELU
    on_device: tuple[Any, ...] = moved(arguments, lambda tensor: tensor.to(device.array_device, copy=True))
    apart = device.ops.gated_linear(strided(on_device[0]), *on_device[1:])
    device.synchronize()
    hold(record_gate, ratio(apart.cpu(), dense.double(), [dense], "rows of a wider tensor"))


def _rows(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor, begin: int, end: int) -> tuple[object, ...]:
    """Cut a weight and its bias to some rows."""
    zeros = None if weight.zeros is None else weight.zeros[begin:end]
    codes, scales = weight.codes[begin:end], weight.scales[begin:end]
    return x, replace(weight, codes=codes, scales=scales, zeros=zeros), bias[begin:end]


_SPOILT = SPOILT | {
    "odd-rows": lambda x, weight, bias: _rows(x, weight, bias, 1, len(bias)),
    # Their parts in a careless cut, two rows and one, can be broadcast.
    "three-rows": lambda x, weight, bias: _rows(x, weight, bias, 0, 3),
}


@conforms(level="L2", clause=("9.6", "9.10"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_scheme("w8a8", "w8a16-groups-of-64-zeros", "w4a16-groups-of-128-zeros", "w4a16-groups-of-6")
@pytest.mark.parametrize("spoil", _SPOILT)
def test_shapes_that_do_not_fit_are_refused(
    device: Device, dtype: str, name: str, spoil: str, record_gate: Any
) -> None:
    x, weight, bias = _arguments(Inputs(dtype), name, 3, 6)
    with pytest.raises(REFUSALS):
        run_one(device, "gated_linear", *_SPOILT[spoil](x, weight.held(), bias), Activation.SILU)
    got, wanted = (run(x, weight, bias, Activation.SILU) for run in (_gated_on(device), exact_gated))
    hold(record_gate, nmse_of_rows(got, wanted, stored(dtype, weight)))


@conforms(level="L2", gate="G1", clause=("9.10", "10.13"), claims=("batch_invariant",))
@by_dtype
@pytest.mark.parametrize("inner", [17, 2100])
def test_bits_do_not_depend_on_the_batch(subject: Subject, dtype: str, inner: int, record_gate: Any) -> None:
    draw = Inputs(dtype)
    weight, bias = draw.normal(2 * inner, 65, scale=0.25), draw.normal(2 * inner)
    _same_in_every_batch(subject, draw.normal(40, 65), (weight, bias, Activation.SILU), record_gate)


@conforms(level="L2", gate="G1", clause=("9.6", "9.10", "10.13"), claims=("batch_invariant",))
@by_dtype
@by_scheme("w8a8", "w8a16", "w8a16-groups-of-64-zeros", "w4a16-groups-of-32", "w4a16-groups-of-128-zeros")
def test_bits_of_codes_do_not_depend_on_the_batch(subject: Subject, dtype: str, name: str, record_gate: Any) -> None:
    x, weight, bias = _arguments(Inputs(dtype), name, 40, 70)
    _same_in_every_batch(subject, x, (weight.held(), bias, Activation.SILU), record_gate)


def _same_in_every_batch(subject: Subject, x: torch.Tensor, others: tuple[object, ...], record_gate: Any) -> None:
    """Hold rows of a batch to be, to the bit, those of smaller ones."""
    check_batches(subject, lambda device, rows: run_one(device, "gated_linear", x[rows], *others), record_gate)


def _arguments(draw: Inputs, name: str, tokens: int, inner: int) -> tuple[torch.Tensor, DrawnWeight, torch.Tensor]:
    """Draw rows of four groups of channels, and gates and ups with their bias."""
    channels = 4 * (SCHEMES[name].group_size or 24)
    weight = draw_weight(draw, SCHEMES[name], 2 * inner, channels)
    return draw.normal(tokens, channels), weight, draw.normal(2 * inner)


def _gated(
    device: Device, x: torch.Tensor, weight: DrawnWeight, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    return run_one(device, "gated_linear", x, weight.held(), bias, activation)


def _gated_on(device: Device) -> Callable[..., torch.Tensor]:
    return lambda *arguments: _gated(device, *arguments)
