"""What two recordings of one function have in common, of steps that differ in their number of tokens.

Wherever they differ there must be that number: a field of a struct, an extent of an array, an argument. Then the same
calls serve every number between the two: what depends on it otherwise does so from some number on, and that shows at
one of them. What shows at neither, as a number rounded up where both need no rounding, would be missed; nothing in
core's decoder or in this package's operators is of that kind. `zif_cpu.programs` asks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zif_cpu.recording import Item, NativeCall, NotRecordableError, Recorder, StepCalls, TorchCall

_WORD = 8

Words = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """token_ids, positions: [T], int64."""

    token_ids: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Recording:
    """One pass: what it was given, its calls, what came out, [T, C]."""

    inputs: Inputs
    recorder: Recorder
    output: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.inputs.token_ids)

    def words(self) -> Words:
        """Return the structs that are the same in every step, one behind the other, each from a full word on."""
        structs = (item.struct for item in self.recorder.items if isinstance(item, NativeCall))
        return np.frombuffer(b"".join(padded(struct) for struct in structs if struct is not None), np.int64).copy()


@dataclass(frozen=True, slots=True)
class Common:
    """The calls of two recordings. counts: the places in `Recording.words` of the number of tokens."""

    items: list["NativeCall | CountedCall"]
    counts: Words


class _Count:
    """Stands for the number of tokens."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Stands for an array that has as many entries as there are tokens along `axes`."""

    array: torch.Tensor
    axes: Sequence[int]


@dataclass(frozen=True, slots=True)
class CountedCall:
    """A `TorchCall` of any number of tokens."""

    function: Any
    arguments: Any
    named: Mapping[str, Any]
    results: Any

    def __call__(self, num_tokens: int) -> None:
        named = {name: _at(value, num_tokens) for name, value in self.named.items()}
        TorchCall(self.function, _at(self.arguments, num_tokens), named, _at(self.results, num_tokens))()


def common(low: Recording, high: Recording) -> Common:
    """Return what two recordings have in common. low has fewer tokens. Both must stay while the result is used.

    Raises `NotRecordableError` where they differ in more than the number of tokens.
    """
    numbers = low.num_tokens, high.num_tokens
    _ensure_rows(low.inputs.token_ids, high.inputs.token_ids, numbers)
    _ensure_rows(low.inputs.positions, high.inputs.positions, numbers)
    _ensure_rows(low.output, high.output, numbers)
    items, others = low.recorder.items, high.recorder.items
    _ensure(len(items) == len(others), "how many calls there are")
    _ensure_same_steps(low.recorder.steps, high.recorder.steps)
    calls = [_common_call(one, other, numbers) for one, other in zip(items, others, strict=True)]
    return Common(calls, _counts(low.words(), high.words(), numbers))


def padded(struct: bytes) -> bytes:
    return struct + bytes(-len(struct) % _WORD)


def _ensure_rows(low: torch.Tensor, high: torch.Tensor, numbers: tuple[int, int]) -> None:
    """Ensure that the arrays are one, of a row for each token."""
    rows = _common_array(low, high, numbers)
    _ensure(isinstance(rows, _Rows) and rows.axes == [0], "what comes in or out")


def _counts(low: Words, high: Words, numbers: tuple[int, int]) -> Words:
    places = np.flatnonzero(low != high)
    _ensure(bool((low[places] == numbers[0]).all() and (high[places] == numbers[1]).all()), "a native call")
    return places


def _common_call(low: Item, high: Item, numbers: tuple[int, int]) -> NativeCall | CountedCall:
    if isinstance(low, NativeCall) and isinstance(high, NativeCall):
        sizes = [None if one.struct is None else len(one.struct) for one in (low, high)]
        same = (low.function, low.group, low.index) == (high.function, high.group, high.index)
        _ensure(same and sizes[0] == sizes[1], "the order of native calls")
        return high
    _ensure(isinstance(low, TorchCall) and isinstance(high, TorchCall), "the order of calls")
    assert isinstance(low, TorchCall)
    assert isinstance(high, TorchCall)
    _ensure(low.function is high.function and low.named.keys() == high.named.keys(), "what torch computes")
    return CountedCall(
        low.function,
        _common(tuple(low.arguments), tuple(high.arguments), numbers),
        {name: _common(low.named[name], high.named[name], numbers) for name in low.named},
        _common(tuple(low.results), tuple(high.results), numbers),
    )


def _ensure_same_steps(low: Mapping[Any, StepCalls], high: Mapping[Any, StepCalls]) -> None:
    _ensure(low.keys() == high.keys(), "which groups there are")
    for key, calls in low.items():
        layer = ~calls.is_shared()
        _ensure(np.array_equal(calls.rows()[:, layer], high[key].rows()[:, layer]), "a call of attention")


def _common(low: Any, high: Any, numbers: tuple[int, int]) -> Any:
    """Return what stands for both values."""
    _ensure(type(low) is type(high), "the type of an argument")
    if isinstance(low, torch.Tensor):
        return _common_array(low, high, numbers)
    if isinstance(low, list | tuple):
        _ensure(len(low) == len(high), "how many values an argument has")
        return [_common(one, other, numbers) for one, other in zip(low, high, strict=True)]
    if type(low) is int and (low, high) == numbers:
        return _Count()
    _ensure(low == high, "an argument")
    return low


def _common_array(low: torch.Tensor, high: torch.Tensor, numbers: tuple[int, int]) -> torch.Tensor | _Rows:
    lies = [(one.dtype, one.dim(), one.stride(), one.data_ptr()) for one in (low, high)]
    _ensure(lies[0] == lies[1], "where an array lies")
    extents = list(zip(low.shape, high.shape, strict=True))
    axes = [axis for axis, (one, other) in enumerate(extents) if one != other]
    _ensure(all(extents[axis] == numbers for axis in axes), "the extents of an array")
    return _Rows(high, axes) if axes else high


def _at(value: Any, num_tokens: int) -> Any:
    """Return what `value` stands for in a step of so many tokens."""
    if isinstance(value, _Count):
        return num_tokens
    if isinstance(value, list):
        return [_at(one, num_tokens) for one in value]
    if isinstance(value, _Rows):
        array = value.array
        for axis in value.axes:
            array = array.narrow(axis, 0, num_tokens)
        return array
    return value


def _ensure(holds: bool, what: str) -> None:
    if not holds:
        raise NotRecordableError(f"{what} depends on the number of tokens in another way")
