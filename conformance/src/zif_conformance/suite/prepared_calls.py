"""What the tests of prepared matrices share: calls, memory for matrices and their forms, comparisons. No test."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zif.contract import Activation, Device
from zif.errors import OutOfMemoryError
from zif_conformance.gates import GateResult, GuardedTensor, exact, guarded, hold
from zif_conformance.oracle.inputs import Inputs, strided
from zif_conformance.suite.operator_calls import note_left

TAG = "conformance.weights"


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operator but for its weight. Tensors are on the device."""

    operator: str
    x: torch.Tensor
    bias: torch.Tensor | None
    activation: Activation = Activation.SILU

    def answer(self, device: Device, weight: torch.Tensor) -> torch.Tensor | None:
        """Return what the operator gives for a matrix or a form of it, on the host."""
        more = (self.activation,) if self.operator == "gated_linear" else ()
        got = getattr(device.ops, self.operator)(self.x, weight, self.bias, *more)
        device.synchronize()
        return None if got is None else got.cpu()

    def __str__(self) -> str:
        """Name the call in a message."""
        dense = "dense" if self.x.is_contiguous() else "strided"
        return f"{self.operator} of {len(self.x)} {dense} rows, {'no ' if self.bias is None else ''}bias"


class Lender:
    """Memory of the device's allocator, for matrices and for their forms, as core lends it.

    guards: what `lend` has lent, call by call, between sentinels. What was taken back is lent again first.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.guards: list[GuardedTensor] = []
        self._spare: dict[int, list[GuardedTensor]] = {}

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """Return a matrix of these values."""
        memory = self.device.allocator.allocate(values.nbytes, TAG).array
        matrix: torch.Tensor = memory.view(values.dtype).view(values.shape).copy_(values)
        return matrix

    def lend(self, num_bytes: int) -> torch.Tensor:
        """Be the `allocate` of `prepare_weight`."""
        if num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes!r} must be at least 1")
        spare = self._spare.get(num_bytes)
        self.guards.append(spare.pop() if spare else self._guarded(num_bytes))
        return self.guards[-1].tensor.zero_()

    def prepared(
        self, matrix: torch.Tensor, allocate: Callable[[int], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Return the platform's form of a matrix, or None where it has none of its own."""
        form = self.device.ops.prepare_weight(matrix, allocate or self.lend)
        self.device.synchronize()
        return form

    def take_back(self) -> None:
        """Take back what was lent for forms; anything may be in it from now on."""
        for guard in self.guards:
            guard.tensor.fill_(0xFF)
            self._spare.setdefault(len(guard.tensor), []).append(guard)
        self.guards.clear()

    def _guarded(self, num_bytes: int) -> GuardedTensor:
        filled = guarded(torch.zeros(num_bytes, dtype=torch.uint8), self.device.array_device).memory
        memory = self.device.allocator.allocate(len(filled), TAG).array.copy_(filled)
        margin = (len(filled) - num_bytes) // 2
        return GuardedTensor(memory, memory[margin : margin + num_bytes])


@contextlib.contextmanager
def lending(device: Device) -> Iterator[Lender]:
    """Lend memory that goes back at the end."""
    try:
        yield Lender(device)
    finally:
        device.synchronize()
        device.allocator.free_tag(TAG)


def arbitrary_bits(draw: Inputs, *shape: int) -> torch.Tensor:
    """Draw numbers of arbitrary bits, those that are none being zeros."""
    bits = 8 * draw.dtype.itemsize
    whole = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), *shape).to(getattr(torch, f"int{bits}"))
    values = whole.view(draw.dtype)
    return values.where(values.isfinite(), 0.0)


def drawn_calls(
    device: Device, draw: Inputs, operator: str, shape: tuple[int, int], sizes: Sequence[int]
) -> list[Call]:
    """Draw calls of so many rows each: without a bias, with one, and with rows of a wider tensor."""
    found = []
    for index, rows in enumerate(sizes):
        x = draw.normal(rows, shape[1]).to(device.array_device)
        bias, activation = draw.normal(shape[0]).to(device.array_device), list(Activation)[index % len(Activation)]
        found += [Call(operator, x, None, activation), Call(operator, x, bias, activation)]
        found.append(Call(operator, strided(x), bias, activation))
    return found


def one_hot_calls(device: Device, draw: Inputs, operator: str, inputs: int) -> list[Call]:
    """Return calls of rows with one 1 each: all of them together, and 16 at a time."""
    ones = torch.eye(inputs).to(draw.dtype).to(device.array_device)
    return [Call(operator, ones, None), *(Call(operator, ones[at : at + 16], None) for at in range(0, inputs, 16))]


def answers_of(device: Device, calls: Sequence[Call], weight: torch.Tensor) -> list[torch.Tensor | None]:
    """Return what each call gives for a matrix or a form of it."""
    return [call.answer(device, weight) for call in calls]


def check_same(
    device: Device,
    calls: Sequence[Call],
    weight: torch.Tensor,
    wanted: Sequence[torch.Tensor | None],
    record_gate: Any,
    what: str = "the form",
) -> None:
    """Hold calls to give the bits that they gave with the matrix; the worst one is recorded."""
    results = [
        same_bits(call.answer(device, weight), answer, f"{what}: {call}")
        for call, answer in zip(calls, wanted, strict=True)
    ]
    hold(record_gate, max(results, key=lambda result: result.measured))


def same_bits(got: torch.Tensor | None, wanted: torch.Tensor | None, what: str) -> GateResult:
    """Compare bits, any NaN being any other; an operator leaves its work to another one with both or with none."""
    if got is None or wanted is None:
        return GateResult("G1", float(got is not wanted), 0.0, f"{what}: an answer with one, None with the other")
    return exact(got.masked_fill(got.isnan(), math.nan), wanted.masked_fill(wanted.isnan(), math.nan), what)


def check_overwritten(lender: Lender, matrix: torch.Tensor, calls: Sequence[Call], record_gate: Any) -> None:
    """Hold the form of a matrix to give what the matrix gave before it was overwritten."""
    wanted = answers_of(lender.device, calls, matrix)
    form = lender.prepared(matrix)
    if form is None:
        left_as_it_is(record_gate)
        return
    matrix.fill_(math.nan)
    check_same(lender.device, calls, form, wanted, record_gate)


def refusing(lender: Lender, allowed: int) -> Callable[[int], torch.Tensor]:
    """Return an `allocate` that serves so many requests, and no more."""

    def allocate(num_bytes: int) -> torch.Tensor:
        if len(lender.guards) >= allowed:
            raise OutOfMemoryError(f"no {num_bytes} bytes, for a test")
        return lender.lend(num_bytes)

    return allocate


def left_as_it_is(record_gate: Any) -> None:
    """Record that the platform has no form of its own, which the contract allows."""
    note_left(record_gate, "prepare_weight", "the matrix itself")
