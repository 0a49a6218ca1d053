"""Collectives between processes over gloo, without touching torch's default process group.

Each communicator has a thread that makes the gloo calls, because a gloo call in progress cannot be called off: on a
deadline or an abort the caller goes on, and the thread ends when gloo's own timeout does.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta
from typing import Protocol, cast
from urllib.parse import SplitResult, urlsplit

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    BroadcastOptions,
    FileStore,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)

from zif.contract import Communicator, CommunicatorError, CommunicatorGroup

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)


class _Gloo(Protocol):
    """What is used of `ProcessGroupGloo`, whose operations torch's stubs leave out."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work: ...

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, output_sizes: list[int], input_sizes: list[int]
    ) -> Work: ...

    def broadcast(self, tensors: list[torch.Tensor], options: BroadcastOptions) -> Work: ...

    def send(self, tensors: list[torch.Tensor], target: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work: ...

    def barrier(self) -> Work: ...


class GlooCommunicator(Communicator):
    """One rank's membership in a group. Construction meets the other ranks.

    `make` makes another process group of torch than gloo's, from the store where the ranks meet, the group and the
    deadline; its operations must be called like gloo's.
    """

    def __init__(self, group: CommunicatorGroup, make: "MakeGroup | None" = None) -> None:
        self.group = group
        self._gloo = _join(group, make or _make_gloo)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._aborted: Future[None] = Future()
        self._unusable = ""
        self._last: Future[None] | None = None
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=f"gloo-{group.name}", daemon=True)
        self._thread.start()

    def all_reduce(self, array: torch.Tensor) -> torch.Tensor:
        wide = torch.float32 if array.dtype in _SUMMED_IN_FLOAT32 else array.dtype
        total = array.to(wide, copy=True, memory_format=torch.contiguous_format)
        self._run("all_reduce", lambda: self._gloo.allreduce([total]))
        return total.to(array.dtype)

    def all_gather(self, array: torch.Tensor) -> torch.Tensor:
        own = array.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.group.world_size)]
        self._run("all_gather", lambda: self._gloo.allgather([parts], [own]))
        return torch.cat(parts)

    def reduce_scatter(self, array: torch.Tensor) -> torch.Tensor:
        """Reduce everywhere and keep this rank's part: gloo has no such operation for every dtype."""
        self._check_divisible("reduce_scatter", array)
        return self.all_reduce(array).chunk(self.group.world_size)[self.group.rank].clone()

    def all_to_all(self, array: torch.Tensor) -> torch.Tensor:
        self._check_divisible("all_to_all", array)
        sent, received = array.contiguous(), torch.empty_like(array, memory_format=torch.contiguous_format)
        self._run("all_to_all", lambda: self._gloo.alltoall_base(received, sent, [], []))
        return received

    def broadcast(self, array: torch.Tensor, source: int) -> torch.Tensor:
        shared = array.clone(memory_format=torch.contiguous_format)
        options = BroadcastOptions()
        options.rootRank = source
        self._run("broadcast", lambda: self._gloo.broadcast([shared], options))
        return shared

    def send(self, array: torch.Tensor, target: int) -> None:
        sent = array.contiguous()
        self._run("send", lambda: self._gloo.send([sent], target, 0))

    def receive(self, array: torch.Tensor, source: int) -> torch.Tensor:
        received = torch.empty_like(array, memory_format=torch.contiguous_format)
        self._run("receive", lambda: self._gloo.recv([received], source, 0))
        return received

    def barrier(self) -> None:
        self._run("barrier", lambda: self._gloo.barrier())

    def abort(self) -> None:
        self._leave("it was aborted")

    def close(self) -> None:
        self._leave("it is closed")

    def _leave(self, reason: str) -> None:
        if self._aborted.done():
            return
        self._unusable = self._unusable or reason
        self._aborted.set_result(None)
        self._calls.put(None)
        if self._last is None or self._last.done():
            # A thread that still ran while Python ends could take the process down: gloo's destructors wait for Python.
            # That includes gloo's own threads, which let go of a call's tensors after its end and are joined here.
            self._thread.join(self.group.deadline_s)
            if not self._thread.is_alive():
                del self._gloo

    def _run(self, operation: str, start: Callable[[], Work]) -> None:
        """Make one gloo call and wait for it, for the deadline at most."""
        if self._unusable:
            raise self._error(operation, self._unusable)
        call = _Call(start)
        self._last = call.done
        self._calls.put(call)
        wait((call.done, self._aborted), timeout=self.group.deadline_s, return_when=FIRST_COMPLETED)
        if self._aborted.done():
            raise self._error(operation, self._unusable)
        if not call.done.done():
            self._unusable = f"{operation} did not complete within {self.group.deadline_s} s: a rank is late or gone"
            raise self._error(operation, self._unusable)
        error = call.done.exception()
        if error is not None:
            self._unusable = f"{operation} failed: {error}"
            raise self._error(operation, self._unusable) from error

    def _error(self, operation: str, reason: str) -> CommunicatorError:
        group = self.group
        return CommunicatorError(
            f"{operation} on rank {group.rank} of {group.world_size} in group {group.name!r}: {reason}; "
            "open a new group"
        )

    def _check_divisible(self, operation: str, array: torch.Tensor) -> None:
        if array.shape[0] % self.group.world_size:
            raise ValueError(
                f"{operation}: the first axis has {array.shape[0]} elements, which world_size="
                f"{self.group.world_size} does not divide"
            )


class _Call:
    """One gloo call under way: what starts it, and where its outcome goes."""

    def __init__(self, start: Callable[[], Work]) -> None:
        self.start = start
        self.done: Future[None] = Future()

    def run(self) -> Exception | None:
        """Make the call and wait for it. Returns the error that it ended with."""
        try:
            self.start().wait()
        except (RuntimeError, ValueError) as error:  # gloo and the bindings raise nothing else
            return error
        return None


def _serve(calls: "queue.SimpleQueue[_Call | None]") -> None:
    """Make calls one after the other until None comes."""
    while (call := calls.get()) is not None:
        error, done = call.run(), call.done
        # Who waits for it may end the process at once. What the call holds must be gone by then: if this thread were
        # the last to hold gloo's objects, their destructors would take the process down while Python ends.
        del call
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)


MakeGroup = Callable[[Store, CommunicatorGroup, timedelta], object]


def _make_gloo(store: Store, group: CommunicatorGroup, deadline: timedelta) -> object:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = deadline
    options._devices = [_network_device(urlsplit(group.rendezvous))]
    return ProcessGroupGloo(store, group.rank, group.world_size, options)


def _join(group: CommunicatorGroup, make: MakeGroup) -> _Gloo:
    """Meet the other ranks. Raises `CommunicatorError` when they do not come in time."""
    deadline = timedelta(seconds=group.deadline_s)
    place = urlsplit(group.rendezvous)
    try:
        store = PrefixStore(group.name, _open_store(place, group, deadline))
        joined = cast(_Gloo, make(store, group, deadline))
        # One rank may be connected before another is; if it left now, the other could not finish joining.
        store.set(f"joined/{group.rank}", "yes")
        store.wait([f"joined/{rank}" for rank in range(group.world_size)], deadline)
        return joined
    except RuntimeError as error:  # torch's store and network errors are all of this kind
        raise CommunicatorError(
            f"rank {group.rank} of {group.world_size} could not join group {group.name!r} at {group.rendezvous!r} "
            f"within {group.deadline_s} s: {error}; check that all ranks run and can reach each other"
        ) from error


def _open_store(place: SplitResult, group: CommunicatorGroup, deadline: timedelta) -> Store:
    if place.scheme == "file" and place.path:
        files = FileStore(place.path, group.world_size)
        files.set_timeout(deadline)
        return files
    if place.scheme == "tcp" and place.hostname and place.port:
        return TCPStore(
            place.hostname,
            place.port,
            group.world_size,
            is_master=group.rank == 0,
            timeout=deadline,
            wait_for_workers=False,
        )
    raise CommunicatorError(f"rendezvous {group.rendezvous!r} must be tcp://host:port or file:///path")


def _network_device(place: SplitResult) -> object:
    """Choose the interface: loopback when the ranks meet on this host, else the one that the host's name leads to."""
    if place.scheme == "file" or place.hostname in _LOOPBACK:
        return ProcessGroupGloo.create_device(hostname="127.0.0.1")
    return ProcessGroupGloo.create_default_device()
