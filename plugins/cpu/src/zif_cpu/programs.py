"""Steps as programs: all native calls of a forward pass in one list that one call runs.

A pass is recorded when its number of tokens comes for the second time, and repeated from then on: without Python
between the kernels, without asking for memory. Only what core's runner hands over changes: token ids and positions,
which are copied, and what attention prepared, whose fields are put into the recorded calls.

Of many tokens hardly a number comes twice. There two recordings, of few and of more, make one program of all numbers
between them (`zif_cpu.ranges`), and numbers beyond are recorded to widen it.
"""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import numpy as np
import torch

from zif.contract import GraphRunner
from zif_cpu.library import Library
from zif_cpu.ranges import CountedCall, Inputs, Recording, Words, common, padded
from zif_cpu.recording import Item, NativeCall, NotRecordableError, Products, Recorder, Slab, StepCalls

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

MAX_TOKENS = 64
"""Steps of up to as many tokens have a program for each number of tokens; of more, one for all up to a power of two."""

MAX_TORCH_CALLS = 1000
"""A pass that leaves more than so many operations to torch is not worth recording."""

MAX_TORCH_CALLS_OF_MANY = 32
"""The same for many tokens, of which products must all be native: a program leaves torch one thread."""


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
    """A recorded pass, or, with a second recording of fewer tokens, all between the two. For one thread at a time.

    Leaves torch one thread; `HostDevice.watch`, in which every step runs, gives back what it had.
    """

    def __init__(self, library: Library, recording: Recording, fewer: Recording | None = None) -> None:
        self._run = library.raw.zif_cpu_run
        self._kept = recording, fewer
        self._inputs, self._output = recording.inputs, recording.output
        self._steps = [_step_rows(group, calls) for (group, _), calls in recording.recorder.steps.items()]
        self._words = recording.words()
        items: Sequence[Item | CountedCall] = recording.recorder.items
        self._counts = np.empty(0, np.int64)
        if fewer is not None:
            found = common(fewer, recording)
            items, self._counts = found.items, found.counts
        self._parts = _parts(items, self._words, {(step.group, step.kind): step.rows for step in self._steps})

    def __call__(self, inputs: Inputs, prepared: Mapping[int, Prepared]) -> torch.Tensor:
        num_tokens = len(inputs.token_ids)
        self._inputs.token_ids[:num_tokens].copy_(inputs.token_ids)
        self._inputs.positions[:num_tokens].copy_(inputs.positions)
        self._words[self._counts] = num_tokens
        for step in self._steps:
            step.fill(prepared[step.group])
        # What torch computes here, and with the rows that are sampled, is small. Its threads would wait for one another
        # on processors where the library's threads wait for the next native call.
        torch.set_num_threads(1)
        for part in self._parts:
            if isinstance(part, ctypes.Array):
                self._run(part, len(part))
            elif isinstance(part, CountedCall):
                part(num_tokens)
            else:
                part()
        return self._output[:num_tokens].clone()


@dataclass(eq=False, slots=True)
class _Range:
    """What is recorded of steps that share a program. room: the most tokens that they have.

    least, most: the recordings of the fewest and of the most tokens.
    """

    room: int
    least: Recording | None = None
    most: Recording | None = None
    program: Program | None = None
    misses: int = 0

    def is_due(self) -> bool:
        """Count a step that no program serves; return whether to record it: the second, fourth, eighth and so on.

        A recorded step takes longer than others, and where numbers fall one by one each is a new one.
        """
        self.misses += 1
        return self.misses > 1 and self.misses.bit_count() == 1

    def find(self, num_tokens: int) -> Program | None:
        if self.least is None or self.most is None or not self.least.num_tokens <= num_tokens <= self.most.num_tokens:
            return None
        return self.program

    def add(self, library: Library, recording: Recording) -> None:
        """Serve this number of tokens from now on, too. Raises `NotRecordableError` where its calls are others."""
        least, most = self.least or recording, self.most or recording
        if recording.num_tokens < least.num_tokens:
            least = recording
        if recording.num_tokens > most.num_tokens:
            most = recording
        self.program = Program(library, most, None if least is most else least)
        self.least, self.most = least, most


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
    """One function with its programs, by the most tokens that one serves. Steps of more than `most` run as they are."""

    graphs: StepPrograms
    function: Callable[..., torch.Tensor]
    ranges: dict[int, _Range] = field(default_factory=dict)
    most: int = sys.maxsize

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        prepared = None if named else _repeatable(arguments)
        if prepared is None:
            return self.function(*arguments, **named)
        inputs = Inputs(arguments[0], arguments[1])
        num_tokens = len(inputs.token_ids)
        room = _room(num_tokens)
        if room > self.most:
            return self.function(*arguments)
        known = self.ranges.setdefault(room, _Range(room))
        if program := known.find(num_tokens):
            return program(inputs, prepared)
        if not known.is_due():
            is_first = room > MAX_TOKENS and known.misses == 1
            return self._look(room, arguments) if is_first else self.function(*arguments)
        try:
            return self._record(known, inputs, arguments[2])
        except NotRecordableError as error:
            self._give_up(0 if room <= MAX_TOKENS else room // 2, error)
            return self.function(*arguments)

    def _look(self, room: int, arguments: tuple[Any, ...]) -> torch.Tensor:
        """Run the first of some steps of many tokens as it is, and see whether its products are native."""
        with Products() as products:
            output = self.function(*arguments)
        if products.found:
            self._give_up(room // 2, NotRecordableError("torch makes products of theirs"))
        return output

    def _give_up(self, most: int, error: NotRecordableError) -> None:
        """Run steps of more than `most` tokens as they are from now on."""
        self.most = most
        logger.info("steps of more than %d tokens run call by call: %s", most, error)
        self.ranges = {size: one for size, one in self.ranges.items() if size <= most}

    def _record(self, known: _Range, inputs: Inputs, attend: Any) -> torch.Tensor:
        """Run a step as it is and keep it as a program, or as part of one."""
        graphs, num_tokens, is_of_many = self.graphs, len(inputs.token_ids), known.room > MAX_TOKENS
        slab = graphs.slab = graphs.slab or Slab()
        recorder = Recorder(slab, num_tokens, known.room) if is_of_many else Recorder(slab)
        kept = Inputs(*(slab.empty(one.shape, one.dtype).copy_(one) for one in (inputs.token_ids, inputs.positions)))
        with _all(graphs.sources, recorder), recorder:
            output = self.function(kept.token_ids, kept.positions, attend)
        result = output.clone()
        try:
            _ensure_worth(recorder, MAX_TORCH_CALLS_OF_MANY if is_of_many else MAX_TORCH_CALLS)
            known.add(graphs.library, Recording(kept, recorder, output))
        except NotRecordableError as error:
            self._give_up(MAX_TOKENS if is_of_many else 0, error)
        return result


def _ensure_worth(recorder: Recorder, most: int) -> None:
    """Raise `NotRecordableError` where torch computes more than `most` operations."""
    if sum(not isinstance(item, NativeCall) for item in recorder.items) > most:
        raise NotRecordableError(f"torch computes more than {most} of their operations")


def _room(num_tokens: int) -> int:
    """Return the most tokens that a step has which shares the program."""
    return num_tokens if num_tokens <= MAX_TOKENS else 1 << (num_tokens - 1).bit_length()


def _repeatable(arguments: tuple[Any, ...]) -> Mapping[int, Prepared] | None:
    """Return what attention prepared, by layer group, where native calls alone serve this step."""
    if len(arguments) != 3 or not len(arguments[0]):
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
    return _StepRows(group, calls.kind, calls.rows(), np.flatnonzero(calls.is_shared()))


def _parts(
    items: Sequence[Item | CountedCall],
    words: Words,
    rows: Mapping[tuple[int, type[ctypes.Structure]], np.ndarray[Any, np.dtype[np.uint8]]],
) -> "list[ctypes.Array[_Entry] | Callable[[], None] | CountedCall]":
    """Put native calls that follow each other into one list."""
    parts: list[ctypes.Array[_Entry] | Callable[[], None] | CountedCall] = []
    run: list[_Entry] = []
    place = words.ctypes.data
    for item in (*items, None):
        if isinstance(item, NativeCall):
            if item.struct is not None:
                run.append(_Entry(item.function, place))
                place += len(padded(item.struct))
            else:
                assert item.group is not None, "a call without its struct"
                structs = rows[item.group]
                run.append(_Entry(item.function, structs.ctypes.data + item.index * structs.strides[0]))
            continue
        if run:
            parts.append((_Entry * len(run))(*run))
            run = []
        if item is not None:
            parts.append(item)
    return parts
