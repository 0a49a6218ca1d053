"""L2: matrices in a form of the platform's own, which must change no bit; of platforms without one a note says so.

Each call is compared with the same call on the matrix itself, so what is right is a matter of the other tests.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from zif.contract import Device
from zif.errors import OutOfMemoryError
from zif_conformance.gates import GateResult, exact, guarded, hold
from zif_conformance.marks import Safety, conforms
from zif_conformance.oracle.inputs import Inputs, strided
from zif_conformance.subject import Subject
from zif_conformance.suite.operator_calls import REFUSALS, by_dtype, check_batches, note_left
from zif_conformance.suite.prepared_calls import (
    Call,
    Lender,
    answers_of,
    arbitrary_bits,
    check_overwritten,
    check_same,
    drawn_calls,
    left_as_it_is,
    lending,
    one_hot_calls,
    refusing,
    same_bits,
)

OPERATORS = ("linear", "gated_linear", "logits")
ROWS = (0, 1, 2, 5, 16, 17, 33, 70, 130)
FEW_ROWS = (1, 5, 33)
SHAPES = [(64, 128), (100, 256), (33, 384), (1, 128), (48, 130), (2, 1), (200, 1024), (520, 96)]
"""Outputs and inputs of a matrix."""
FEW_SHAPES = [(64, 128), (48, 130), (2, 1), (100, 257)]

by_operator = pytest.mark.parametrize("operator", OPERATORS)
by_few_shapes = pytest.mark.parametrize("shape", FEW_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
by_case = pytest.mark.parametrize(
    ("operator", "shape"),
    [
        pytest.param(operator, shape, id=f"{operator}-{shape[0]}x{shape[1]}")
        for operator in OPERATORS
        for shape in SHAPES
        if operator != "gated_linear" or shape[0] % 2 == 0
    ],
)


@pytest.fixture
def lender(device: Device) -> Iterator[Lender]:
    """Memory of the device under test."""
    with lending(device) as found:
        yield found


@conforms(level="L2", gate="G1", clause="9.11")
@by_dtype
@by_case
def test_bits_are_those_of_the_matrix(
    device: Device, lender: Lender, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    """The matrix itself serves as before, too: something else may read it."""
    draw = Inputs(dtype, shape[1])
    matrix = lender.matrix(draw.normal(*shape, scale=shape[1] ** -0.5))
    calls = drawn_calls(device, draw, operator, shape, ROWS)
    wanted = answers_of(device, calls, matrix)
    form = lender.prepared(matrix)
    if form is None:
        left_as_it_is(record_gate)
        return
    check_same(device, calls, form, wanted, record_gate)
    check_same(device, calls, matrix, wanted, record_gate, "the matrix itself")


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
@by_few_shapes
def test_the_matrix_may_be_overwritten(
    device: Device, lender: Lender, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    draw = Inputs(dtype)
    matrix = lender.matrix(draw.normal(*shape))
    check_overwritten(lender, matrix, drawn_calls(device, draw, operator, shape, FEW_ROWS), record_gate)


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
@by_few_shapes
def test_every_bit_of_a_weight_counts(
    device: Device, lender: Lender, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    """Numbers of arbitrary bits, and rows of one 1 each: every weight is a sum of its own, whatever its exponent."""
    draw = Inputs(dtype, 1)
    matrix = lender.matrix(arbitrary_bits(draw, *shape))
    calls = one_hot_calls(device, draw, operator, shape[1]) + drawn_calls(device, draw, operator, shape, FEW_ROWS)
    check_overwritten(lender, matrix, calls, record_gate)


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
@by_few_shapes
def test_special_values_of_weights(
    device: Device, lender: Lender, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    """Each row of the matrix has one value that is special, or nothing else; the last one is zeros below zero."""
    draw = Inputs(dtype, 2)
    found, values = _specials(draw.dtype), draw.normal(*shape)
    for row in range(len(values)):
        special = found[row % len(found)]
        values[row, 7 * row % shape[1]] = special
        if row % 3 == 2:
            values[row] = special
    values[-1] = -0.0
    check_overwritten(lender, lender.matrix(values), drawn_calls(device, draw, operator, shape, FEW_ROWS), record_gate)


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
@pytest.mark.parametrize("which", ["special", "arbitrary", "in-one-row"])
def test_few_weights_unlike_the_others(
    device: Device, lender: Lender, dtype: str, operator: str, which: str, record_gate: Any
) -> None:
    """One weight in 512, so that a form with room for few exceptions is not refused to the matrix as a whole."""
    draw, shape = Inputs(dtype, 12), (128, 512)
    values = draw.normal(*shape, scale=0.05)
    rows, strange = torch.arange(len(values)), arbitrary_bits(draw, len(values))
    if which == "special":
        strange = _specials(draw.dtype).repeat(len(values))[: len(values)]
    if which == "in-one-row":
        values[77, -len(strange) :] = strange
    else:
        # The first column and the last are among them.
        values[rows, (511 - 73 * rows) % shape[1]] = strange
    calls = one_hot_calls(device, draw, operator, shape[1]) + drawn_calls(device, draw, operator, shape, ROWS)
    check_overwritten(lender, lender.matrix(values), calls, record_gate)


@conforms(level="L2", gate="G1", clause="9.11")
@by_dtype
@by_operator
def test_sizes_of_weights_may_lie_far_apart(
    device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any
) -> None:
    """Rows, and columns, of few exponents and of all: a scale or a range shared by neighbours shows."""
    draw, shape = Inputs(dtype, 3), (96, 256)
    lowest, highest = (math.frexp(value)[1] for value in (torch.finfo(draw.dtype).tiny, torch.finfo(draw.dtype).max))
    for span in ((-3, 4), (lowest, highest - 3)):
        for sizes in (draw.integers(*span, 1, shape[1]), draw.integers(*span, shape[0], 1)):
            matrix = lender.matrix((draw.normal(*shape).double().clamp(-4, 4) * 2.0**sizes).to(draw.dtype))
            check_overwritten(lender, matrix, drawn_calls(device, draw, operator, shape, FEW_ROWS), record_gate)


@conforms(level="L2", gate="G1", clause=("9.3", "9.11"), negative=True)
@by_dtype
@by_operator
def test_rows_of_a_wider_matrix(device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any) -> None:
    """The rest of the wider matrix is NaN: a row read at the wrong place shows."""
    draw, shape = Inputs(dtype, 4), (48, 130)
    matrix = strided(draw.normal(*shape).to(device.array_device))
    check_overwritten(lender, matrix, drawn_calls(device, draw, operator, shape, FEW_ROWS), record_gate)


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
def test_matrices_that_lie_in_one_place_after_each_other(
    device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any
) -> None:
    """Nothing may be known by an address: each form is of what stood there when it was made, and a matrix of now."""
    draw, shape = Inputs(dtype, 5), (48, 128)
    calls = drawn_calls(device, draw, operator, shape, FEW_ROWS)
    values = [draw.normal(*shape) for _ in range(3)]
    matrix = lender.matrix(values[0])
    wanted = [answers_of(device, calls, matrix.copy_(one)) for one in values]
    forms = []
    for one, answers in zip(values, wanted, strict=True):
        matrix.copy_(one)
        check_same(device, calls, matrix, answers, record_gate, "a matrix where another one was prepared")
        forms.append(lender.prepared(matrix))
    matrix.fill_(math.nan)
    for index in (2, 0, 1, 0):
        form = forms[index]
        if form is None:
            left_as_it_is(record_gate)
        else:
            check_same(device, calls, form, wanted[index], record_gate, f"form {index} of 3")


@conforms(level="L2", gate="G1", clause="9.11", negative=True)
@by_dtype
@by_operator
def test_forms_that_lie_in_one_place_after_each_other(
    device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any
) -> None:
    """Memory that went back is lent again: nothing may be known of the form that was there."""
    draw = Inputs(dtype, 6)
    for shape in ((48, 128), (48, 128), (24, 256), (48, 128)):
        matrix = lender.matrix(draw.normal(*shape))
        check_overwritten(lender, matrix, drawn_calls(device, draw, operator, shape, FEW_ROWS), record_gate)
        lender.take_back()


@conforms(level="L2", gate="G1", clause=("6.2", "9.11"), negative=True)
@by_dtype
@by_operator
def test_out_of_memory_leaves_the_operators_usable(
    device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any
) -> None:
    """Memory runs out at each of the requests in turn; then the matrix serves, and is prepared after all."""
    draw, shape = Inputs(dtype, 7), (64, 128)
    values = draw.normal(*shape)
    matrix, calls = lender.matrix(values), drawn_calls(device, draw, operator, shape, FEW_ROWS)
    wanted = answers_of(device, calls, matrix)
    if lender.prepared(matrix) is None:
        left_as_it_is(record_gate)
        return
    requests = len(lender.guards)
    lender.take_back()
    for allowed in range(requests):
        form = None
        with contextlib.suppress(OutOfMemoryError):
            form = lender.prepared(matrix, refusing(lender, allowed))
        if form is not None:
            # A smaller one: whatever it is, it is none of the matrix.
            matrix.fill_(math.nan)
            check_same(device, calls, form, wanted, record_gate, "a form in less memory")
            matrix.copy_(values)
        lender.take_back()
        check_same(device, calls, matrix, wanted, record_gate, f"the matrix, of which request {allowed} was refused")
    check_overwritten(lender, matrix, calls, record_gate)


@conforms(level="L2", gate="G1", clause=("6.3", "9.11"))
@by_dtype
def test_a_form_lies_in_what_was_lent(device: Device, lender: Lender, dtype: str, record_gate: Any) -> None:
    """Half of the bits of random numbers are beyond any form: of what was not lent, no plan of the memory knows."""
    matrix = lender.matrix(Inputs(dtype, 8).normal(256, 384))
    before = device.allocator.stats().allocated_bytes
    form = lender.prepared(matrix)
    held = device.allocator.stats().allocated_bytes - before
    lent = sum(len(guard.memory) for guard in lender.guards)
    hold(record_gate, GateResult("G1", float(abs(held - lent)), 0.0, "bytes taken that were not lent, or given back"))
    if form is None:
        left_as_it_is(record_gate)
        return
    x = torch.ones(3, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    before = len(lender.guards)
    Call("linear", x, None).answer(device, form)
    hold(record_gate, GateResult("G1", float(len(lender.guards) - before), 0.0, "requests after the call"))
    missing = max(0, matrix.nbytes // 2 - sum(len(guard.tensor) for guard in lender.guards))
    hold(record_gate, GateResult("G1", float(missing), 0.0, "bytes that a form needs beyond what was lent"))


@conforms(level="L2", gate="G1", clause=("9.2", "9.11"), negative=True, safety=Safety.MEMORY)
@by_dtype
@by_operator
@by_few_shapes
def test_nothing_around_arguments_is_written(
    device: Device, lender: Lender, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    """Of the matrix while it is prepared, of what is lent for its form, and of the others while the form is used."""
    draw = Inputs(dtype, 9)
    values = draw.normal(*shape)
    kept = guarded(values, device.array_device)
    form = lender.prepared(kept.tensor)
    hold(record_gate, kept.untouched("matrix"), exact(kept.tensor, values, "matrix"))
    if form is None:
        left_as_it_is(record_gate)
        return
    for call in drawn_calls(device, draw, operator, shape, FEW_ROWS):
        before = [tensor.cpu().clone() for tensor in (call.x, call.bias) if tensor is not None]
        guards = [guarded(tensor, device.array_device) for tensor in before]
        x, *bias = [guard.tensor for guard in guards]
        replace(call, x=x, bias=bias[0] if bias else None).answer(device, form)
        for guard, tensor, name in zip(guards, before, ("x", "bias"), strict=False):
            hold(record_gate, guard.untouched(name), exact(guard.tensor, tensor, name))
    hold(record_gate, *(guard.untouched("lent memory") for guard in lender.guards))


@conforms(level="L2", gate="G1", clause="9.11", negative=True, safety=Safety.MEMORY)
@by_dtype
@by_operator
def test_shapes_that_do_not_fit_are_refused(
    device: Device, lender: Lender, dtype: str, operator: str, record_gate: Any
) -> None:
    draw, shape = Inputs(dtype, 10), (6, 128)
    matrix, odd = lender.matrix(draw.normal(*shape)), lender.matrix(draw.normal(5, 128))
    forms = lender.prepared(matrix), lender.prepared(odd)
    calls = drawn_calls(device, draw, operator, shape, FEW_ROWS)
    wanted = answers_of(device, calls, matrix)
    if wanted[0] is None:
        note_left(record_gate, "logits", "linear")
        return
    if forms[0] is None:
        left_as_it_is(record_gate)
        return
    for call in calls:
        spoilt = [(forms[0], replace(call, x=call.x[:, 1:].contiguous()))]
        if call.bias is not None:
            spoilt.append((forms[0], replace(call, bias=call.bias[1:].contiguous())))
        if operator == "gated_linear" and forms[1] is not None:
            spoilt.append((forms[1], replace(call, bias=None)))
        for form, spoilt_call in spoilt:
            with pytest.raises(REFUSALS):
                spoilt_call.answer(device, form)
    check_same(device, calls, forms[0], wanted, record_gate)


@conforms(level="L2", gate="G1", clause=("9.11", "10.13"), claims=("batch_invariant",))
@by_dtype
@by_operator
@pytest.mark.parametrize("shape", [(34, 65), (520, 256)], ids=["34x65", "520x256"])
def test_bits_do_not_depend_on_the_batch(
    subject: Subject, dtype: str, operator: str, shape: tuple[int, int], record_gate: Any
) -> None:
    """Where the matrix has no form, and where logits are left to `linear`, of these."""
    draw = Inputs(dtype, 11)
    x, values, bias = draw.normal(40, shape[1]), draw.normal(*shape, scale=0.25), draw.normal(shape[0])

    def run(device: Device, rows: slice) -> torch.Tensor:
        call = Call(operator, x[rows].to(device.array_device), bias.to(device.array_device))
        with lending(device) as lender:
            matrix = lender.matrix(values)
            if call.answer(device, matrix) is None:
                call = replace(call, operator="linear")
            wanted, form = call.answer(device, matrix), lender.prepared(matrix)
            got = wanted if form is None else call.answer(device, form)
        hold(record_gate, same_bits(got, wanted, str(call)))
        assert got is not None
        return got

    check_batches(subject, run, record_gate)


def _specials(dtype: torch.dtype) -> torch.Tensor:
    """Return infinities, NaN, numbers at the ends of the range, subnormal ones, and zeros."""
    limits = torch.finfo(dtype)
    ends = [limits.max, limits.min, limits.tiny, limits.tiny * limits.eps, -limits.tiny / 2]
    return torch.tensor([math.inf, -math.inf, math.nan, *ends, 0.0, -0.0], dtype=torch.float64).to(dtype)
