"""Decoding steps as captured graphs: one per bucket of requests, captured when the bucket has proved to be in use.

A step is replayed when its attention was prepared for a bucket: its arrays then lie where those of the captured step
lay, padded to the bucket. Token ids and positions are padded here. Every other step runs as it is. How a device
captures is behind `Capture`; `TorchCapture` does it with torch's graphs.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch

from zif.accelerator.faults import device_faults
from zif.contract import GraphRunner

P = ParamSpec("P")
R = TypeVar("R")

_MAX_MOVES = 8
"""Block tables may grow now and then, and their arrays move; a bucket whose arrays move more often is not captured."""

Replay = Callable[[], torch.Tensor]


class Capture(ABC):
    """How a device records work and repeats it."""

    @abstractmethod
    def capture(self, function: Replay) -> Replay:
        """Record what `function` submits. Returns what submits the same again and gives the same output tensor.

        `function` may run more than once, and its work may or may not have been done afterwards. Raises `RuntimeError`
        when the device cannot record it.
        """


class TorchCapture(Capture):
    """Capture with the graphs of torch's module for the device; `graph_class` is the name of their class there.

    All graphs share one memory pool, because none runs beside another.
    """

    def __init__(self, array_device: str, graph_class: str) -> None:
        self._array_device = array_device
        self._module: Any = torch.get_device_module(array_device)
        self._make = getattr(self._module, graph_class)
        self._stream: Any = None
        self._pool: Any = None

    def capture(self, function: Replay) -> Replay:
        if self._stream is None:
            self._stream, self._pool = self._module.Stream(self._array_device), self._module.graph_pool_handle()
        current = self._module.current_stream(self._array_device)
        try:
            # A capture that fails may leave its stream the current one: the outer context puts the old one back.
            with device_faults(self._array_device), self._module.stream(current):
                self._run_once(function, current)
                return self._record(function)
        except BaseException:
            self._stream = None  # what a broken capture has left in its stream and its pool is not used again
            raise

    def _record(self, function: Replay) -> Replay:
        graph = self._make()
        # Other threads, those that watch collectives for instance, may go on calling the device.
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with self._module.graph(graph, **options):
            output = function()
        return _Recorded(graph, output, self._array_device)

    def _run_once(self, function: Replay, current: Any) -> None:
        """Run as it is, at the shapes of the capture: compiling and setting libraries up cannot be captured."""
        self._stream.wait_stream(current)
        with self._module.stream(self._stream):
            function()
        current.wait_stream(self._stream)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph with its output, whose memory lives as long as the graph does."""

    graph: Any
    output: torch.Tensor
    array_device: str

    def __call__(self) -> torch.Tensor:
        with device_faults(self.array_device):
            self.graph.replay()
        return self.output


@dataclass(slots=True)
class _Bucket:
    """What is known of one bucket of one function. `places` says where the arrays of the captured step lie."""

    num_eager: int = 0
    token_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    replay: Replay | None = None
    places: tuple[tuple[int, ...], ...] = ()
    num_moves: int = 0
    failed: bool = False


class BucketedGraphs(GraphRunner):
    """Wrap the runner's forward function, `forward(token_ids, positions, attend, *states)`.

    A bucket is captured after `warm_steps` steps ran as they are, so that no first answer waits for it, and only while
    fewer than `max_graphs` are held. `notes` says what could not be captured. Calls come from one thread.
    """

    def __init__(self, capture: Capture, warm_steps: int = 2, max_graphs: int = 32) -> None:
        self._capture = capture
        self._warm_steps = warm_steps
        self._max_graphs = max_graphs
        self._wrapped: weakref.WeakSet[_Wrapped] = weakref.WeakSet()
        self._notes: list[str] = []

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        wrapped = _Wrapped(self, cast(Callable[..., Any], function))
        self._wrapped.add(wrapped)
        return cast(Callable[P, R], wrapped)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what could not be captured and why, oldest first, each once."""
        return tuple(self._notes)

    @property
    def num_graphs(self) -> int:
        """Count the graphs held."""
        return sum(bucket.replay is not None for wrapped in self._wrapped for bucket in wrapped.buckets.values())

    def forget(self) -> None:
        """Drop all graphs: the addresses that they hold are about to be void. Steps capture again later."""
        for wrapped in self._wrapped:
            wrapped.buckets.clear()

    def _may_capture(self, bucket: _Bucket) -> bool:
        return not bucket.failed and bucket.num_eager >= self._warm_steps and self.num_graphs < self._max_graphs

    def _record(self, size: int, bucket: _Bucket, function: Replay) -> None:
        """Capture, or note why not and leave the bucket to run as it is from then on."""
        try:
            bucket.replay = self._capture.capture(function)
        except (RuntimeError, MemoryError) as error:
            self._give_up(size, bucket, next(iter(str(error).splitlines()), type(error).__name__))

    def _give_up(self, size: int, bucket: _Bucket, reason: str) -> None:
        bucket.failed = True
        note = f"steps of {size} requests are not captured: {reason}"
        if note not in self._notes:
            self._notes.append(note)


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Wrapped:
    """One function with its graphs, by bucket."""

    graphs: BucketedGraphs
    function: Callable[..., Any]
    buckets: dict[int, _Bucket] = field(default_factory=dict)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        step = None if named else _decoding_step(arguments)
        if step is None:
            return self.function(*arguments, **named)
        bucket = self.buckets.setdefault(step.bucket, _Bucket())
        if bucket.replay is not None and bucket.places != step.places:
            self._moved(step.bucket, bucket)
        if bucket.replay is None and self.graphs._may_capture(bucket):
            self._capture(step, bucket)
        if bucket.replay is None:
            bucket.num_eager += 1
            return self.function(*arguments)
        _fill(bucket, step)
        # The graph writes to the same place each time, and a result is the caller's (clause 5.4).
        return bucket.replay()[: len(step.token_ids)].clone()

    def _moved(self, size: int, bucket: _Bucket) -> None:
        """Drop a graph that would read where the arrays lay when it was captured."""
        bucket.replay, bucket.num_eager = None, 0
        bucket.num_moves += 1
        if bucket.num_moves > _MAX_MOVES:
            self.graphs._give_up(size, bucket, "their arrays do not stay in place")

    def _capture(self, step: "_Step", bucket: _Bucket) -> None:
        if bucket.token_ids is None or bucket.positions is None:
            bucket.token_ids, bucket.positions = _padded(step.token_ids, step), _padded(step.positions, step)
        _fill(bucket, step)
        token_ids, positions, attend = bucket.token_ids, bucket.positions, step.attend
        self.graphs._record(step.bucket, bucket, lambda: self.function(token_ids, positions, attend))
        bucket.places = step.places


@dataclass(frozen=True, slots=True)
class _Step:
    """The arguments of a step that may be replayed. token_ids, positions: [T], at most `bucket` of them."""

    bucket: int
    token_ids: torch.Tensor
    positions: torch.Tensor
    attend: Any
    places: tuple[tuple[int, ...], ...]


def _decoding_step(arguments: tuple[Any, ...]) -> _Step | None:
    """Return the step when its attention, in all layer groups, was prepared for one bucket and no states are given."""
    if len(arguments) != 3:
        return None
    token_ids, positions, attend = arguments
    prepared = getattr(attend, "prepared", None)
    if not isinstance(prepared, Mapping) or not prepared:
        return None
    buckets = {getattr(one, "bucket", None) for one in prepared.values()}
    bucket = buckets.pop() if len(buckets) == 1 else None
    if bucket is None or not len(token_ids) == len(positions) <= bucket:
        return None
    places = tuple(place for group in sorted(prepared) for place in _places(prepared[group]))
    return _Step(bucket, token_ids, positions, attend, places)


def _places(value: Any) -> Iterator[tuple[int, ...]]:
    """Yield address, shape and strides of every tensor in what attention prepared."""
    if isinstance(value, torch.Tensor):
        yield (value.data_ptr(), *value.shape, *value.stride())
    elif is_dataclass(value):
        for part in fields(value):
            yield from _places(getattr(value, part.name))


def _padded(rows: torch.Tensor, step: _Step) -> torch.Tensor:
    # No inference tensor, whoever captures: it is written to again at every replay.
    with torch.inference_mode(False):
        return torch.zeros((step.bucket, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)


def _fill(bucket: _Bucket, step: _Step) -> None:
    """Put the step's rows where the graph reads them; rows behind them are zero."""
    for buffer, rows in ((bucket.token_ids, step.token_ids), (bucket.positions, step.positions)):
        assert buffer is not None, "a graph without its buffers"
        buffer[: len(rows)].copy_(rows)
        buffer[len(rows) :].zero_()
