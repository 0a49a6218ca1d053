"""L2: products with weights held as integers, by scheme, dtype and shape: values, codes, rounding, rows, bad input."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from zif.contract import Activation, Device, Feature, RouterOutput
from zif_conformance.gates import NMSE_LIMITS, exact, hold, nmse, nmse_of_rows, ratio, ulp
from zif_conformance.marks import Safety, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.quantization import (
    CODES,
    PLAIN_ZERO,
    ZEROS,
    DrawnExperts,
    DrawnWeight,
    activations,
    constant_weight,
    declared_product,
    draw_weight,
    exact_experts,
    exact_product,
)
from zif_conformance.oracle.quantized_cases import (
    SCHEMES,
    ExpertsCase,
    ProductCase,
    experts_cases,
    product_cases,
)
from zif_conformance.suite.operator_calls import (
    REFUSALS,
    SPOILT,
    by_case,
    by_dtype,
    by_scheme,
    check_untouched,
    run_one,
    stored,
)

DYNAMIC = [name for name, scheme in SCHEMES.items() if scheme.dynamic_activations]
UNGROUPED = ("w8a8", "w8a16", "w4a16")
LARGEST = 127
"""The largest code of an activation."""


@conforms(level="L2", gate="G4", clause=("9.1", "9.3", "9.6"))
@by_dtype
@by_case(product_cases())
def test_value(device: Device, dtype: str, case: ProductCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    got = _product(device, call.x, call.weight, call.bias)
    assert got.dtype == call.x.dtype, "the result has another dtype than x"
    hold(record_gate, nmse_of_rows(got, exact_product(call.x, call.weight, call.bias), stored(dtype, call.weight)))


@conforms(level="L2", gate="G4", clause=("9.1", "9.3", "9.6"), claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@by_case(experts_cases())
def test_expert_value(device: Device, dtype: str, case: ExpertsCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    got = _experts(device, call.x, call.weights, call.routed, call.activation)
    wanted = exact_experts(call.x, call.weights, call.routed, call.activation)
    assert got.dtype == call.x.dtype, "the result has another dtype than x"
    hold(record_gate, nmse_of_rows(got, wanted, _stored_within(dtype, call.weights)))


@conforms(level="L2", gate="G1", clause="9.2", negative=True, safety=Safety.MEMORY)
@by_dtype
@by_case(product_cases())
def test_nothing_around_arguments_is_written(device: Device, dtype: str, case: ProductCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    check_untouched(device, "quantized_linear", (call.x, call.weight.held(), call.bias), record_gate)


@conforms(
    level="L2", gate="G1", clause="9.2", negative=True, safety=Safety.MEMORY, claims=(Feature.MIXTURE_OF_EXPERTS,)
)
@by_dtype
@by_case(experts_cases())
def test_nothing_around_expert_arguments_is_written(
    device: Device, dtype: str, case: ExpertsCase, record_gate: Any
) -> None:
    call = case.call(Inputs(dtype))
    check_untouched(
        device, "quantized_experts", (call.x, call.weights.held(), call.routed, call.activation), record_gate
    )


@conforms(level="L2", gate="G0", clause=("9.1", "9.6"))
@by_dtype
@by_scheme()
def test_one_element_carries_a_product(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """All inputs are 0 but one: a code, a scale or a zero of another place is wrong by all of its value."""
    draw = Inputs(dtype)
    group = SCHEMES[name].group_size or 48
    weight = draw_weight(draw, SCHEMES[name], 17, 3 * group)
    for place in sorted({0, 1, group // 2 - 1, group // 2, group - 1, group, 2 * group, 3 * group - 1}):
        x = torch.zeros(5, 3 * group, dtype=draw.dtype)
        # A power of two times the largest code, so that a scale of activations is exact.
        x[:, place] = draw.signs(5) * LARGEST / 64
        got, wanted = _product(device, x, weight), exact_product(x, weight, None)
        hold(record_gate, replace(ulp(got, wanted, 4), where=f"input {place}: {ulp(got, wanted, 4).where}"))


@conforms(level="L2", gate="G2", clause=("9.1", "9.6"), negative=True)
@by_dtype
@by_scheme()
def test_extreme_codes_do_not_overflow(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Every product of codes as large as can be, of one sign or of both, and zeros at the far end."""
    scheme, draw = SCHEMES[name], Inputs(dtype)
    low, high = CODES[scheme.bits]
    inner = 1920  # a multiple of every group
    codes = torch.tensor([low, high, low, high])[:, None].expand(-1, inner).clone()
    codes[2, ::2], codes[3, 1::4] = high, low
    weight = constant_weight(scheme, codes, 2.0**-12)
    if scheme.zero_points:
        weight.zeros[:] = torch.tensor([ZEROS[scheme.bits][1], ZEROS[scheme.bits][0]] * 2)[:, None]
    x = torch.full((4, inner), LARGEST / 128, dtype=draw.dtype)
    x[1], x[2, ::2], x[3, ::3] = -x[1], -x[2, ::2], -x[3, ::3]
    size = activations(x, scheme).abs() @ weight.elements().abs().T
    hold(record_gate, ulp(_product(device, x, weight), exact_product(x, weight, None), 4, size))


@conforms(level="L2", gate="G1", clause="9.7", negative=True)
@by_dtype
@by_scheme("w8a8", "w8a8-groups-of-32")
@pytest.mark.parametrize("exponent", [-6, 0, 5])
def test_activations_are_rounded_to_the_nearest_code(
    device: Device, dtype: str, name: str, exponent: int, record_gate: Any
) -> None:
    """Quarters of codes, halves among them, which go to the even one; the scale is a power of two, so all is exact."""
    draw = Inputs(dtype)
    wanted = torch.zeros(4, 32, dtype=torch.float64)
    quarters = torch.arange(32.0) - 16 + torch.tensor([0.0, 0.25, 0.5, 0.75])[:, None]
    quarters[:, -1] = torch.tensor([1.0, -1.0, 1.0, -1.0]) * LARGEST
    for row in range(4):
        wanted[row] = torch.tensor([_half_to_even(value) for value in quarters[row].tolist()])
    weight = constant_weight(SCHEMES[name], torch.eye(32, dtype=torch.int64))
    got = _product(device, (quarters * 2.0**exponent).to(draw.dtype), weight)
    # A code of 0 has no sign.
    hold(record_gate, exact(got + 0.0, (wanted * 2.0**exponent).to(draw.dtype), "codes"))


@conforms(level="L2", gate="G3", clause=("9.6", "9.7"))
@by_dtype
@by_scheme(*DYNAMIC)
def test_codes_that_are_beyond_doubt(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Activations that lie on codes, so that their rounding decides nothing: what is left is an error of sums."""
    draw = Inputs(dtype)
    inner = 5 * (SCHEMES[name].group_size or 26)
    peaks = torch.tensor([1.0, 1.5, 0.7, 300.0, 2.0**-9, 1.9, 3.0])[:, None].to(draw.dtype).double()
    codes = draw.integers(-LARGEST, LARGEST + 1, 7, inner)
    codes[:, 3] = LARGEST
    x = (codes * peaks / LARGEST).to(draw.dtype)
    weight, bias = draw_weight(draw, SCHEMES[name], 33, inner), draw.normal(33)
    wanted, declared = exact_product(x, weight, bias), declared_product(x, weight, bias)
    hold(record_gate, ratio(_product(device, x, weight, bias), wanted, [declared], "on codes"))


@conforms(level="L2", gate="G4", clause="9.7", negative=True)
@by_dtype
@by_scheme()
def test_a_row_is_the_same_alone_and_beside_others(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Rows of very different sizes: a scale that others had a part in drowns the small ones."""
    draw = Inputs(dtype)
    inner = 4 * (SCHEMES[name].group_size or 24)
    x = (draw.normal(9, inner) * 4.0 ** torch.arange(-4.0, 5.0)[:, None]).to(draw.dtype)
    weight = draw_weight(draw, SCHEMES[name], 48, inner)
    together, wanted = _product(device, x, weight), exact_product(x, weight, None)
    for row in range(len(x)):
        alone = _product(device, x[row : row + 1], weight)
        for got in (together[row : row + 1], alone):
            hold(record_gate, nmse(got, wanted[row : row + 1], stored(dtype, weight)))


@conforms(level="L2", gate="G4", clause="9.6", negative=True)
@by_dtype
@by_scheme()
def test_activations_of_any_size(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Rows near the ends of the dtype's exponents."""
    draw = Inputs(dtype)
    inner = 4 * (SCHEMES[name].group_size or 24)
    weight = draw_weight(draw, SCHEMES[name], 48, inner)
    for share in (-0.75, 0.6):
        size = 2.0 ** int(math.log2(torch.finfo(draw.dtype).max) * share)
        x = (draw.normal(5, inner).float() * size).to(draw.dtype)
        got, wanted = _product(device, x, weight), exact_product(x, weight, None)
        hold(record_gate, nmse_of_rows(got.double() / size, wanted / size, stored(dtype, weight)))


@conforms(level="L2", gate="G1", clause=("9.6", "9.7"), negative=True)
@by_dtype
@by_scheme()
def test_rows_of_zeros_give_the_bias(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    draw = Inputs(dtype)
    inner = 2 * (SCHEMES[name].group_size or 24)
    x = draw.normal(4, inner)
    x[0], x[2] = 0.0, -0.0
    weight, bias = draw_weight(draw, SCHEMES[name], 19, inner), draw.normal(19)
    hold(record_gate, exact(_product(device, x, weight, bias)[[0, 2]], bias.expand(2, -1), "rows of zeros"))
    assert (_product(device, x, weight)[[0, 2]] == 0).all(), "a row of zeros without a bias is not zero"


@conforms(level="L2", gate="G6", clause=("9.6", "9.7"), negative=True)
@by_dtype
@by_scheme()
def test_what_is_not_finite_shows_in_its_row_alone(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    draw = Inputs(dtype)
    inner = 2 * (SCHEMES[name].group_size or 24)
    x, weight, bias = draw.normal(7, inner), draw_weight(draw, SCHEMES[name], 35, inner), draw.normal(35)
    clean = _product(device, x, weight, bias)
    x[1, 1], x[2, inner - 1], x[5, 0] = math.nan, math.inf, -math.inf
    dirty = _product(device, x, weight, bias)
    others = [0, 3, 4, 6]
    hold(record_gate, exact(dirty[others], clean[others], "the other rows"))
    # Of infinities a device without codes makes infinities or NaN, as it takes the code, its zero and 0 apart.
    shown = dirty[[1, 2, 5]].isnan() if SCHEMES[name].dynamic_activations else ~dirty[[1, 2, 5]].isfinite()
    assert shown.all(), "a value that is not finite was swallowed"
    assert dirty[1].isnan().all(), "a NaN was swallowed"


@conforms(level="L2", gate="G6", clause=("9.6", "9.7"), negative=True, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@by_scheme(*UNGROUPED)
def test_nan_stays_in_its_row_of_experts(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    draw = Inputs(dtype)
    scheme, x = SCHEMES[name], draw.normal(4, 16)
    weights = DrawnExperts(draw_weight(draw, scheme, 3, 16, 16), draw_weight(draw, scheme, 3, 16, 8))
    routed = RouterOutput(torch.full((4, 2), 0.5), torch.tensor([[0, 1], [0, 1], [1, 2], [0, 2]]))
    clean = _experts(device, x, weights, routed, Activation.SILU)
    x[1, 5] = math.nan
    dirty = _experts(device, x, weights, routed, Activation.SILU)
    hold(record_gate, exact(dirty[[0, 2, 3]], clean[[0, 2, 3]], "rows without NaN"))
    assert dirty[1].isnan().all(), "a NaN in a row was swallowed"


@conforms(level="L2", gate="G1", clause=("9.1", "9.6"), claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@by_scheme(*UNGROUPED)
def test_tokens_and_experts_are_not_mixed_up(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Expert e multiplies by 2 to the e, by its scale alone, so that a wrong one shows in the bits."""
    draw, scheme = Inputs(dtype), SCHEMES[name]
    x = torch.zeros(9, 8, dtype=draw.dtype)
    x[range(9), [token % 8 for token in range(9)]] = draw.signs(9) * LARGEST
    eye = torch.eye(8, dtype=torch.int64).expand(4, -1, -1)
    codes = torch.cat((torch.zeros_like(eye), eye), dim=1) + PLAIN_ZERO[scheme.bits]
    gate_up, down = constant_weight(scheme, codes), constant_weight(scheme, eye + PLAIN_ZERO[scheme.bits])
    down.scales[:] = 2.0 ** torch.arange(4.0)[:, None, None]
    bias = torch.zeros(4, 16, dtype=draw.dtype)
    bias[:, :8] = 32.0  # the gate: its sigmoid is 1 in float32
    ids = torch.tensor([[token % 4, (token + 1 + token // 4 % 3) % 4] for token in range(9)])
    shares = torch.tensor([0.75, 0.25]).repeat(9, 1)
    weights = DrawnExperts(gate_up, down, bias, torch.zeros(4, 8, dtype=draw.dtype))
    got = _experts(device, x, weights, RouterOutput(shares, ids), Activation.SILU)
    factors = (shares.double() * 2.0 ** ids.double()).sum(-1, keepdim=True)
    hold(record_gate, exact(got + 0.0, (x.double() * 32 * factors).to(draw.dtype) + 0.0, "outputs"))


@conforms(level="L2", gate="G1", clause=("9.2", "9.3"), negative=True)
@by_dtype
@by_scheme()
def test_strides_do_not_matter(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """The same values as rows of a wider tensor of NaN, on the device: a row read at the wrong place shows."""
    draw = Inputs(dtype)
    inner = 3 * (SCHEMES[name].group_size or 22)
    x, weight, bias = draw.normal(19, inner), draw_weight(draw, SCHEMES[name], 30, inner), draw.normal(30)
    for tokens in (2, 19):
        rows = x[:tokens]
        dense = _product(device, rows, weight, bias)
        first, *others = moved((rows, weight.held(), bias), lambda tensor: tensor.to(device.array_device, copy=True))
        assert isinstance(first, torch.Tensor)
        apart = device.ops.quantized_linear(strided(first), *others)  # type: ignore[arg-type]
        device.synchronize()
        hold(record_gate, ratio(apart.cpu(), dense.double(), [dense], f"{tokens} rows"))


@conforms(level="L2", clause="9.6", negative=True, safety=Safety.MEMORY)
@by_dtype
@by_scheme("w8a8", "w8a16-groups-of-64-zeros", "w4a16-groups-of-128-zeros", "w4a16-groups-of-6")
@pytest.mark.parametrize("spoil", SPOILT)
def test_shapes_that_do_not_fit_are_refused(
    device: Device, dtype: str, name: str, spoil: str, record_gate: Any
) -> None:
    draw = Inputs(dtype)
    inner = 4 * (SCHEMES[name].group_size or 16)
    x, weight, bias = draw.normal(3, inner), draw_weight(draw, SCHEMES[name], 12, inner), draw.normal(12)
    with pytest.raises(REFUSALS):
        run_one(device, "quantized_linear", *SPOILT[spoil](x, weight.held(), bias))
    got, wanted = _product(device, x, weight, bias), exact_product(x, weight, bias)
    hold(record_gate, nmse_of_rows(got, wanted, stored(dtype, weight)))


@conforms(level="L2", clause="9.6", negative=True, safety=Safety.MEMORY, claims=(Feature.MIXTURE_OF_EXPERTS,))
@by_dtype
@by_scheme(*UNGROUPED)
@pytest.mark.parametrize("expert", [-1, 3, 2**31, -(2**31)])
def test_experts_that_do_not_exist_are_refused(
    device: Device, dtype: str, name: str, expert: int, record_gate: Any
) -> None:
    draw = Inputs(dtype)
    x, scheme = draw.normal(4, 16), SCHEMES[name]
    weights = DrawnExperts(draw_weight(draw, scheme, 3, 16, 16), draw_weight(draw, scheme, 3, 16, 8))
    ids = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0]])
    good, bad = (RouterOutput(torch.full((4, 2), 0.5), ids.index_fill(0, torch.tensor(3), e)) for e in (0, expert))
    with pytest.raises(REFUSALS):
        _experts(device, x, weights, bad, Activation.SILU)
    got, wanted = (run(x, weights, good, Activation.SILU) for run in (_experts_on(device), exact_experts))
    hold(record_gate, nmse_of_rows(got, wanted, _stored_within(dtype, weights)))


def _product(device: Device, x: torch.Tensor, weight: DrawnWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return run_one(device, "quantized_linear", x, weight.held(), bias)


def _experts(
    device: Device, x: torch.Tensor, weights: DrawnExperts, routed: RouterOutput, activation: Activation
) -> torch.Tensor:
    return run_one(device, "quantized_experts", x, weights.held(), routed, activation)


def _experts_on(device: Device) -> Callable[..., torch.Tensor]:
    return lambda *arguments: _experts(device, *arguments)


def _stored_within(dtype: str, weights: DrawnExperts) -> str:
    """Name what experts keep their operands in: between two products in the dtype of x, which moves some codes."""
    return max(stored(dtype, weights.down), dtype, key=NMSE_LIMITS.__getitem__)


def _half_to_even(value: float) -> float:
    """Round to the nearest integer, ties to the even one, as Python's own rounding does."""
    return float(round(value))
