"""L2: logits of output matrices held as integers, by platforms that give them unrounded; of the others it is noted.

Codes, scales and zeros are those of `test_l2_quantized`; here it is what the dtype of hidden would round away.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zif.contract import Device
from zif_conformance.gates import GateResult, exact, hold, nmse_of_rows, ratio, ulp
from zif_conformance.marks import Safety, cases, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.quantization import (
    PLAIN_ZERO,
    DrawnWeight,
    activations,
    constant_weight,
    declared_product,
    draw_weight,
    exact_product,
)
from zif_conformance.oracle.quantized_cases import SCHEMES, ProductCase, product_cases
from zif_conformance.plugin import ClaimsInTest
from zif_conformance.subject import Subject
from zif_conformance.suite.operator_calls import (
    DTYPES,
    REFUSALS,
    SPOILT,
    by_case,
    by_dtype,
    by_scheme,
    check_always_or_never,
    check_batches,
    check_untouched,
    note_left,
    run_if_served,
    run_one,
    stored,
)

CASES = product_cases()
FEW_CASES = [case for case in CASES if case.tokens in (0, 3)]
STEPS = torch.arange(17.0)

Arguments = tuple[torch.Tensor, DrawnWeight, torch.Tensor | None]
"""hidden: [S, C]. weight: [V, C]. bias: [V]."""


@conforms(level="L2", gate="G4", clause=("9.3", "9.6", "9.9"))
@by_dtype
@by_case(CASES)
def test_value(device: Device, dtype: str, case: ProductCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    wanted = exact_product(call.x, call.weight, call.bias)
    arguments = call.x, call.weight, call.bias
    _holds(device, arguments, record_gate, lambda got: [nmse_of_rows(got, wanted, stored(dtype, call.weight))])


@conforms(level="L2", gate="G3", clause=("9.6", "9.7", "9.9"))
@by_dtype
@by_scheme()
def test_codes_that_are_beyond_doubt(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Hidden rows that are codes times a power of two: what is left is an error of sums in float32, of any dtype."""
    draw = Inputs(dtype)
    inner = 5 * (SCHEMES[name].group_size or 26)
    codes = draw.integers(-127, 128, 7, inner)
    codes[:, 3] = 127
    hidden = (codes / 64.0).to(draw.dtype)
    arguments = hidden, draw_weight(draw, SCHEMES[name], 66, inner), draw.normal(66)
    wanted, declared = exact_product(*arguments), declared_product(hidden.float(), *arguments[1:])
    _holds(device, arguments, record_gate, lambda got: [ratio(got, wanted, [declared], "on codes")])


@conforms(level="L2", gate="G2", clause=("9.6", "9.7", "9.9"))
@by_dtype
@by_scheme()
def test_a_product_is_these_logits_rounded_once(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """What `quantized_linear` gives is one rounding away: the same codes of hidden, and none where there are none."""
    arguments = _arguments(Inputs(dtype), name, 9, 130)
    hidden, weight, bias = arguments
    rounded = run_one(device, "quantized_linear", hidden, weight.held(), bias)
    assert bias is not None
    terms = activations(hidden, weight.scheme).abs() @ weight.elements().abs().T + bias.double().abs()
    _holds(device, arguments, record_gate, lambda got: [ulp(rounded, got.double(), hidden.shape[1], terms)])


@conforms(level="L2", gate="G1", clause="9.9")
@by_dtype
@by_scheme()
def test_bits_below_the_dtype_are_kept(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Logits of a row lie 2**-20 apart, exactly, by their bias: rounded once they would be equal."""
    scheme, dtype_of = SCHEMES[name], Inputs(dtype).dtype
    inner = 2 * (scheme.group_size or 16)
    # The largest code times a power of two, so that a scale of hidden rows is exact.
    hidden = torch.zeros(3, inner)
    hidden[:, 1] = torch.tensor([1.0, -1.0, 0.5]) * 127 / 64
    codes = torch.full((17, inner), PLAIN_ZERO[scheme.bits])
    codes[:, 1] += 1
    expected = hidden[:, 1, None] + STEPS * 2.0**-20
    arguments = hidden.to(dtype_of), constant_weight(scheme, codes), (STEPS * 2.0**-20).to(dtype_of)
    _holds(device, arguments, record_gate, lambda got: [exact(got, expected, "logits")])


@conforms(level="L2", gate="G1", clause="9.9", negative=True)
@pytest.mark.parametrize("dtype", cases("dtype", "float16"))
@by_scheme()
def test_logits_beyond_the_range_of_the_dtype_are_kept(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    scheme = SCHEMES[name]
    inner = 4 * (scheme.group_size or 16)
    signs = torch.tensor([1.0, -1.0])[:, None]
    weight = constant_weight(scheme, torch.full((17, inner), PLAIN_ZERO[scheme.bits] + 4), 1024.0)
    hidden = (254.0 * signs).expand(2, inner).to(Inputs(dtype).dtype)
    expected = (254.0 * 4 * 1024 * inner * signs).expand(2, 17)
    _holds(device, (hidden, weight, None), record_gate, lambda got: [exact(got, expected, "logits")])


@conforms(level="L2", gate="G6", clause=("9.6", "9.7", "9.9"), negative=True)
@by_dtype
@by_scheme()
def test_broken_rows_stay_alone(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """A NaN and infinities show in all of their rows; the bits of the others are those of a batch without them."""
    arguments = _arguments(Inputs(dtype), name, 7, 35)
    clean = _logits(device, arguments)
    hidden = arguments[0]
    hidden[1, 1], hidden[2, -1], hidden[5, 0] = math.nan, math.inf, -math.inf

    def judge(got: torch.Tensor) -> list[GateResult]:
        assert clean is not None, "None for numbers, and an answer where one is not"
        assert not got[[2, 5]].isfinite().any(), "an infinity was swallowed"
        assert got[1].isnan().all(), "a NaN was swallowed"
        return [exact(got[[0, 3, 4, 6]], clean[[0, 3, 4, 6]], "rows of numbers")]

    _holds(device, arguments, record_gate, judge)


@conforms(level="L2", gate="G1", clause=("9.9", "10.13"), claims=("batch_invariant",))
@by_dtype
@by_scheme("w8a8", "w8a16", "w8a16-groups-of-64-zeros", "w4a16-groups-of-32", "w4a16-groups-of-128-zeros")
def test_bits_do_not_depend_on_the_batch(subject: Subject, dtype: str, name: str, record_gate: Any) -> None:
    """Of `quantized_linear`, where logits are left to it."""
    hidden, weight, bias = _arguments(Inputs(dtype), name, 40, 70)

    def run(device: Device, rows: slice) -> torch.Tensor:
        got = _logits(device, (hidden[rows], weight, bias))
        return run_one(device, "quantized_linear", hidden[rows], weight.held(), bias) if got is None else got

    check_batches(subject, run, record_gate)


@conforms(level="L2", gate="G1", clause=("9.2", "9.9"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_case(FEW_CASES)
def test_nothing_around_arguments_is_written(device: Device, dtype: str, case: ProductCase, record_gate: Any) -> None:
    call = case.call(Inputs(dtype))
    check_untouched(device, "quantized_logits", (call.x, call.weight.held(), call.bias), record_gate)


@conforms(level="L2", gate="G3", clause=("9.3", "9.9"), negative=True)
@by_dtype
@by_scheme()
def test_strides_do_not_matter(device: Device, dtype: str, name: str, record_gate: Any) -> None:
    """Rows of a wider array of NaN, on the device: a row read at the wrong place shows."""
    hidden, weight, bias = _arguments(Inputs(dtype), name, 19, 30)
    on_device: tuple[Any, ...] = moved(
        (hidden, weight.held(), bias), lambda tensor: tensor.to(device.array_device, copy=True)
    )
    apart = device.ops.quantized_logits(strided(on_device[0]), *on_device[1:])
    device.synchronize()

    def judge(dense: torch.Tensor) -> list[GateResult]:
        assert apart is not None, "None for rows of a wider array, and an answer for dense ones"
        return [ratio(apart.cpu(), dense.double(), [dense], "rows of a wider array")]

    _holds(device, (hidden, weight, bias), record_gate, judge)


@conforms(level="L2", gate="G1", clause="9.9", negative=True)
def test_a_platform_that_leaves_them_always_does(device: Device, claims: ClaimsInTest, record_gate: Any) -> None:
    answers = {}
    for dtype in (dtype for dtype in DTYPES if claims.has(f"dtype:{dtype}")):
        for case in (case for case in CASES if claims.has(case.scheme.feature)):
            call = case.call(Inputs(dtype))
            answers[dtype, case.case_id] = _logits(device, (call.x, call.weight, call.bias))
    check_always_or_never(answers, record_gate)


@conforms(level="L2", clause=("9.6", "9.9"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_scheme("w8a8", "w8a16-groups-of-64-zeros", "w4a16-groups-of-128-zeros", "w4a16-groups-of-6")
@pytest.mark.parametrize("spoil", SPOILT)
def test_shapes_that_do_not_fit_are_refused(
    device: Device, dtype: str, name: str, spoil: str, record_gate: Any
) -> None:
    hidden, weight, bias = good = _arguments(Inputs(dtype), name, 3, 12)
    if _logits(device, good) is None:
        _left(record_gate)
        return
    assert bias is not None
    with pytest.raises(REFUSALS):
        run_one(device, "quantized_logits", *SPOILT[spoil](hidden, weight.held(), bias))
    wanted = exact_product(*good)
    _holds(device, good, record_gate, lambda got: [nmse_of_rows(got, wanted, stored(dtype, weight))])


def _arguments(draw: Inputs, name: str, rows: int, vocab_size: int) -> Arguments:
    """Draw rows of four groups of channels, a weight and its bias."""
    channels = 4 * (SCHEMES[name].group_size or 24)
    weight = draw_weight(draw, SCHEMES[name], vocab_size, channels)
    return draw.normal(rows, channels), weight, draw.normal(vocab_size)


def _logits(device: Device, arguments: Arguments) -> torch.Tensor | None:
    hidden, weight, bias = arguments
    return run_if_served(device, "quantized_logits", hidden, weight.held(), bias)


def _holds(
    device: Device, arguments: Arguments, record_gate: Any, judge: Callable[[torch.Tensor], list[GateResult]]
) -> None:
    got = _logits(device, arguments)
    if got is None:
        _left(record_gate)
        return
    assert got.dtype == torch.float32, f"logits are {got.dtype}, not float32"
    hold(record_gate, *judge(got))


def _left(record_gate: Any) -> None:
    note_left(record_gate, "quantized_logits", "quantized_linear")
