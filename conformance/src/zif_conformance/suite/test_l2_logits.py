"""L2: logits in float32, by platforms that give them; of the others a note says that they leave them to `linear`."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from zif.contract import Device
from zif_conformance.gates import GateResult, exact, guarded, hold, ratio, specials, ulp
from zif_conformance.marks import Safety, cases, conforms
from zif_conformance.oracle.inputs import Inputs, moved, strided
from zif_conformance.oracle.operators import declared_run, exact_run, sequential_product
from zif_conformance.plugin import ClaimsInTest
from zif_conformance.subject import Subject
from zif_conformance.suite.operator_calls import (
    DTYPES,
    REFUSALS,
    by_dtype,
    check_always_or_never,
    check_batches,
    note_left,
    run_if_served,
    run_one,
)

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""hidden: [S, C]. weight: [V, C]. bias: [V]."""

SHAPES = [
    *(
        (rows, channels, size)
        for rows, channels in ((1, 64), (2, 65), (17, 130), (40, 33))
        for size in (1, 17, 700, 5003)
    ),
    (5, 1000, 7),
    (0, 16, 8),
]
"""S, C and V."""
FEW_SHAPES = [(1, 64, 1), (17, 130, 17), (40, 33, 5003), (0, 16, 8)]

by_bias = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])


def by_shape(shapes: list[tuple[int, int, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", shapes, ids=lambda shape: "x".join(map(str, shape)))


@conforms(level="L2", gate="G3", clause="9.9")
@by_dtype
@by_bias
@by_shape(SHAPES)
def test_value(device: Device, dtype: str, has_bias: bool, shape: tuple[int, int, int], record_gate: Any) -> None:
    arguments = _arguments(dtype, shape, has_bias)
    _holds(device, arguments, record_gate, lambda got: [_near(got, arguments)])


@conforms(level="L2", gate="G1", clause="9.9")
@by_dtype
def test_bits_below_the_dtype_are_kept(device: Device, dtype: str, record_gate: Any) -> None:
    """Logits of a row lie 2**-20 apart, exactly, whatever the order of the sum: rounded once they would be equal."""
    dtype_of = Inputs(dtype).dtype
    steps = torch.arange(17.0)
    hidden = torch.zeros(3, 40)
    hidden[:, 7], hidden[:, 33] = torch.tensor([1.0, 2.0, -4.0]), 2.0**-10
    weight = torch.zeros(17, 40)
    weight[:, 7], weight[:, 33] = 1.0, steps * 2.0**-10
    expected = hidden[:, 7, None] + steps * 2.0**-20
    arguments = hidden.to(dtype_of), weight.to(dtype_of), None
    _holds(device, arguments, record_gate, lambda got: [exact(got, expected, "logits")])


@conforms(level="L2", gate="G1", clause="9.9", negative=True)
@pytest.mark.parametrize("dtype", cases("dtype", "float16"))
def test_logits_beyond_the_range_of_the_dtype_are_kept(device: Device, dtype: str, record_gate: Any) -> None:
    signs = torch.tensor([1.0, -1.0])[:, None]
    hidden, weight = (300.0 * signs).expand(2, 64), torch.full((17, 64), 300.0)
    expected = (300.0 * 300.0 * 64 * signs).expand(2, 17)
    arguments = hidden.to(Inputs(dtype).dtype), weight.to(Inputs(dtype).dtype), None
    _holds(device, arguments, record_gate, lambda got: [exact(got, expected, "logits")])


@conforms(level="L2", gate="G6", clause="9.9", negative=True)
@by_dtype
@by_bias
def test_broken_rows_stay_alone(device: Device, dtype: str, has_bias: bool, record_gate: Any) -> None:
    """A NaN and an infinity show in all of their rows; the bits of the others are those of a batch without them."""
    arguments = _arguments(dtype, (6, 40, 700), has_bias)
    clean = _logits(device, arguments)
    arguments[0][2, 3], arguments[0][4, 39] = math.nan, math.inf
    (wanted,) = exact_run("linear", *arguments)

    def judge(got: torch.Tensor) -> list[GateResult]:
        assert clean is not None, "None for numbers, and an answer where one is not"
        others = exact(got[[0, 1, 3, 5]], clean[[0, 1, 3, 5]], "rows of numbers")
        return [others, specials(got[[2, 4]], wanted[[2, 4]].float(), "broken rows")]

    _holds(device, arguments, record_gate, judge)


@conforms(level="L2", gate="G3", clause="9.9")
@by_dtype
def test_rows_do_not_mix(device: Device, dtype: str, record_gate: Any) -> None:
    """Rows whose sizes lie far apart are right together, in another order, and alone."""
    hidden, weight, bias = _arguments(dtype, (17, 65, 700), has_bias=True)
    hidden = hidden * (2.0 ** (torch.arange(17.0) % 5 - 2)).to(hidden.dtype)[:, None]
    for rows in (range(17), range(16, -1, -1), (0,), (16,), (3, 4)):
        arguments = hidden[list(rows)], weight, bias
        _holds(device, arguments, record_gate, lambda got, now=arguments: [_near(got, now)])  # type: ignore[misc]


@conforms(level="L2", gate="G1", clause=("9.9", "10.13"), claims=("batch_invariant",))
@by_dtype
@by_bias
@pytest.mark.parametrize("vocab_size", [17, 5003])
def test_bits_do_not_depend_on_the_batch(
    subject: Subject, dtype: str, has_bias: bool, vocab_size: int, record_gate: Any
) -> None:
    """Of `linear`, where logits are left to it."""
    hidden, weight, bias = _arguments(dtype, (40, 65, vocab_size), has_bias)

    def run(device: Device, rows: slice) -> torch.Tensor:
        arguments = hidden[rows], weight, bias
        got = _logits(device, arguments)
        return run_one(device, "linear", *arguments) if got is None else got

    check_batches(subject, run, record_gate)


@conforms(level="L2", gate="G1", clause=("9.2", "9.9"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_bias
@by_shape(FEW_SHAPES)
def test_nothing_around_arguments_is_written(
    device: Device, dtype: str, has_bias: bool, shape: tuple[int, int, int], record_gate: Any
) -> None:
    arguments = _arguments(dtype, shape, has_bias)
    before = [tensor for tensor in arguments if tensor is not None]
    kept = [guarded(tensor, device.array_device) for tensor in before]
    hidden, weight, *bias = [guard.tensor for guard in kept]
    if device.ops.logits(hidden, weight, bias[0] if bias else None) is None:
        _left_to_linear(record_gate)
        return
    device.synchronize()
    for guard, tensor, name in zip(kept, before, ("hidden", "weight", "bias"), strict=False):
        hold(record_gate, guard.untouched(name), exact(guard.tensor, tensor, name))


@conforms(level="L2", gate="G3", clause=("9.3", "9.9"), negative=True)
@by_dtype
@by_shape([(3, 65, 17), (40, 64, 700)])
def test_strides_do_not_matter(device: Device, dtype: str, shape: tuple[int, int, int], record_gate: Any) -> None:
    """Rows of a wider array of NaN, on the device: a row read at the wrong place shows."""
    arguments = _arguments(dtype, shape, has_bias=True)
    on_device: tuple[Any, ...] = moved(arguments, lambda tensor: tensor.to(device.array_device, copy=True))
    got = device.ops.logits(strided(on_device[0]), *on_device[1:])
    if got is None:
        _left_to_linear(record_gate)
        return
    device.synchronize()
    hold(record_gate, _near(got.cpu(), arguments))


@conforms(level="L2", gate="G1", clause="9.9", negative=True)
def test_a_platform_that_leaves_logits_always_does(device: Device, claims: ClaimsInTest, record_gate: Any) -> None:
    dtypes = [dtype for dtype in DTYPES if claims.has(f"dtype:{dtype}")]
    calls = product(dtypes, SHAPES, (False, True))
    check_always_or_never({call: _logits(device, _arguments(*call)) for call in calls}, record_gate)


@conforms(level="L2", clause=("9.1", "9.9"), negative=True, safety=Safety.MEMORY)
@by_dtype
@pytest.mark.parametrize(
    "spoil",
    [
        lambda hidden, weight, bias: (hidden, weight[:, 1:].contiguous(), bias),
        lambda hidden, weight, bias: (hidden[:, 1:].contiguous(), weight, bias),
        lambda hidden, weight, bias: (hidden, weight, bias[1:]),
    ],
    ids=["narrow-weight", "narrow-hidden", "short-bias"],
)
def test_shapes_that_do_not_fit_are_refused(
    device: Device, dtype: str, spoil: Callable[..., Arguments], record_gate: Any
) -> None:
    good = _arguments(dtype, (6, 32, 24), has_bias=True)
    if _logits(device, good) is None:
        _left_to_linear(record_gate)
        return
    with pytest.raises(REFUSALS):
        _logits(device, spoil(*good))
    _holds(device, good, record_gate, lambda got: [_near(got, good)])


def _arguments(dtype: str, shape: tuple[int, int, int], has_bias: bool) -> Arguments:
    rows, channels, vocab_size = shape
    draw = Inputs(dtype, vocab_size)
    weight = draw.normal(vocab_size, channels, scale=channels**-0.5)
    return draw.normal(rows, channels), weight, draw.normal(vocab_size) if has_bias else None


def _logits(device: Device, arguments: Arguments) -> torch.Tensor | None:
    return run_if_served(device, "logits", *arguments)


def _near(got: torch.Tensor, arguments: Arguments) -> GateResult:
    """Compare with float64, where sums in float32 of the same arguments say how near is near."""
    assert got.dtype == torch.float32, f"logits are {got.dtype}, not float32"
    (wanted,) = exact_run("linear", *arguments)
    hidden, weight, bias = (None if tensor is None else tensor.float() for tensor in arguments)
    assert hidden is not None
    assert weight is not None
    if wanted.shape[-1] == 1:
        # One number is a lucky sample: every order of the sum keeps this.
        terms = hidden.double().abs() @ weight.double().abs().T + (0.0 if bias is None else bias.double().abs())
        return ulp(got, wanted, hidden.shape[-1] + 1, terms)
    declared = declared_run("linear", hidden, weight, bias) + declared_run(
        "linear", hidden.flip(1), weight.flip(1), bias
    )
    return ratio(got, wanted, [*declared, sequential_product(hidden, weight, bias)], "logits")


def _holds(
    device: Device, arguments: Arguments, record_gate: Any, judge: Callable[[torch.Tensor], list[GateResult]]
) -> None:
    got = _logits(device, arguments)
    if got is None:
        _left_to_linear(record_gate)
        return
    hold(record_gate, *judge(got))


def _left_to_linear(record_gate: Any) -> None:
    note_left(record_gate, "logits", "linear")
