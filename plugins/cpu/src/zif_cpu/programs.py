"""Steps of few tokens as programs: all native calls of a forward pass in one list that one call runs.

A pass is recorded when its number of tokens comes for the second time, and repeated from then on: without Python
between the kernels, without asking for memory. Only what core's runner hands over changes: token ids and positions,
which are copied, and what attention prepared, whose fields are put into the recorded calls.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import torch

from zif.contract import GraphRunner
from zif_cpu.library import Library
from zif_cpu.recording import NativeCall, NotRecordableError, Recorder, Slab, StepCalls, TorchCall

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_TOKENS = 64
"""Steps of more tokens run as they are: there the kernels take a hundred times as long as the calls between them."""

MAX_TORCH_CALLS = 1000
"""A pass that leaves more than so many operations to torch is not worth recording."""


class Recorded(Protocol):
    """Something whose native calls a recorder hears while the context is entered."""

    def recording(self, recorder: Recorder) -> AbstractContextManager[None]: ...


class Prepared(Protocol):
    """What attention prepared for a step. `repeatable`: native calls alone serve it, those of `step_struct`."""

    @property
    def repeatable(self) -> bool: ...

    def step_struct(self, kind: type[ctypes.Structure]) -> ctypes.Structure: ...


class _Entry(ctypes.Structure):
    """`zif_cpu_entry` of the C ABI."""

    _fields_ = (("function", ctypes.c_void_p), ("call", ctypes.c_void_p))


@dataclass(frozen=True, slots=True)
class _StepRows:
    """The structs of `StepCalls` one below the other, [calls, bytes]; `shared` are the bytes that a step sets."""

    group: int
    kind: type[ctypes.Structure]
    rows: np.ndarray[Any, np.dtype[np.uint8]]
    shared: np.ndarray[Any, np.dtype[np.int64]]

    def fill(self, prepared: Prepared) -> None:
        struct = np.frombuffer(memoryview(prepared.step_struct(self.kind)).cast("B"), np.uint8)
        self.rows[:, self.shared] = struct[self.shared]


class Program:
    """One recorded pass. Not for use by several threads at a time.

    Leaves torch one thread; `HostDevice.watch`, in which every step runs, gives back what it had.
    """

    def __init__(self, library: Library, recorder: Recorder, inputs: "_Inputs", output: torch.Tensor) -> None:
        self._run = library.raw.zif_cpu_run
        self._inputs = inputs
        self._output = output
        self._steps = [_step_rows(group, calls) for (group, _), calls in recorder.steps.items()]
        self._kept = recorder.items
        self._parts = _parts(recorder.items, {(step.group, step.kind): step.rows for step in self._steps})

    def __call__(self, inputs: "_Inputs", prepared: Mapping[int, Prepared]) -> torch.Tensor:
        self._inputs.token_ids.copy_(inputs.token_ids)
        self._inputs.positions.copy_(inputs.positions)
        for step in self._steps:
            step.fill(prepared[step.group])
        # What torch computes here, and with the rows that are sampled, is small. Its threads would wait for one another
        # on processors where the library's threads wait for the next native call.
        torch.set_num_threads(1)
        for part in self._parts:
            if isinstance(part, ctypes.Array):
                self._run(part, len(part))
            else:
                part()
        return self._output.clone()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """token_ids, positions: [T], int64."""

    token_ids: torch.Tensor
    positions: torch.Tensor


class StepPrograms(GraphRunner):
    """Wrap the runner's forward function, `forward(token_ids, positions, attend, *states)`. One thread calls.

    `sources` make the native calls: operators and attention.
    """

    def __init__(self, library: Library, sources: tuple[Recorded, ...]) -> None:
        self.library = library
        self.sources = sources
        self.slab: Slab | None = None

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        return cast(Callable[P, R], _Wrapped(self, cast(Callable[..., torch.Tensor], function)))


@dataclass(eq=False, slots=True)
class _Wrapped:
    """One function with its programs, by number of tokens. None: seen once, or not recordable when in `failed`."""

    graphs: StepPrograms
    function: Callable[..., torch.Tensor]
    programs: dict[int, Program | None] = field(default_factory=dict)
    failed: bool = False

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        prepared = None if named or self.failed else _repeatable(arguments)
        if prepared is None:
            return self.function(*arguments, **named)
        num_tokens = len(arguments[0])
        if num_tokens not in self.programs:
            self.programs[num_tokens] = None
            return self.function(*arguments)
        inputs = _Inputs(arguments[0], arguments[1])
        program = self.programs[num_tokens]
        if program is None:
            try:
                return self._record(inputs, arguments[2])
            except NotRecordableError as error:
                logger.info("steps run call by call: %s", error)
                self.failed = True
                self.programs.clear()
                return self.function(*arguments)
        return program(inputs, prepared)

    def _record(self, inputs: _Inputs, attend: Any) -> torch.Tensor:
        """Run a step as it is and keep it as a program."""
        graphs = self.graphs
        graphs.slab = graphs.slab or Slab()
        kept = _Inputs(inputs.token_ids.clone(), inputs.positions.clone())
        recorder = Recorder(graphs.slab)
        with _all(graphs.sources, recorder), recorder:
            output = self.function(kept.token_ids, kept.positions, attend)
        if sum(not isinstance(item, NativeCall) for item in recorder.items) > MAX_TORCH_CALLS:
            raise NotRecordableError(f"torch computes more than {MAX_TORCH_CALLS} of its operations")
        self.programs[len(kept.token_ids)] = Program(graphs.library, recorder, kept, output)
        return output.clone()


def _repeatable(arguments: tuple[Any, ...]) -> Mapping[int, Prepared] | None:
    """Return what attention prepared, by layer group, where native calls alone serve this step of few tokens."""
    if len(arguments) != 3 or not 0 < len(arguments[0]) <= MAX_TOKENS:
        return None
    prepared = getattr(arguments[2], "prepared", None)
    if not isinstance(prepared, Mapping) or not all(getattr(one, "repeatable", False) for one in prepared.values()):
        return None
    return prepared


@contextmanager
def _all(sources: tuple[Recorded, ...], recorder: Recorder) -> Iterator[None]:
    with ExitStack() as stack:
        for source in sources:
            stack.enter_context(source.recording(recorder))
        yield


def _step_rows(group: int, calls: StepCalls) -> _StepRows:
    size = ctypes.sizeof(calls.kind)
    rows = np.frombuffer(b"".join(calls.calls), np.uint8).reshape(-1, size).copy()
    shared = np.ones(size, np.bool_)
    for name in calls.layer_fields:
        place = getattr(calls.kind, name)
        shared[place.offset : place.offset + place.size] = False
    return _StepRows(group, calls.kind, rows, np.flatnonzero(shared))


def _parts(
    items: Sequence[NativeCall | TorchCall],
    rows: Mapping[tuple[int, type[ctypes.Structure]], "np.ndarray[Any, np.dtype[np.uint8]]"],
) -> "list[ctypes.Array[_Entry] | TorchCall]":
    """Put native calls that follow each other into one list."""
    parts: list[ctypes.Array[_Entry] | TorchCall] = []
    run: list[_Entry] = []
    for item in (*items, None):
        if isinstance(item, NativeCall):
            run.append(_Entry(item.function, _address(item, rows)))
            continue
        if run:
            parts.append((_Entry * len(run))(*run))
            run = []
        if item is not None:
            parts.append(item)
    return parts


def _address(
    item: NativeCall, rows: Mapping[tuple[int, type[ctypes.Structure]], "np.ndarray[Any, np.dtype[np.uint8]]"]
) -> int:
    if item.struct is not None:
        return ctypes.addressof(item.struct)
    assert item.group is not None, "a call without its struct"
    structs = rows[item.group]
    return structs.ctypes.data + item.index * structs.strides[0]
