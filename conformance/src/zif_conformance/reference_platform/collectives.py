"""Collectives through a key-value store: every rank puts its array there and reads those of the others.

One idea serves all: `_exchange` gives each rank the arrays of all ranks, in rank order. It works between processes and
between threads, and waits by asking again, so that a deadline or an abort is heard at once. Not fast: a vendor's
library has better ways.
"""

import json
import threading
import time
from collections import defaultdict
from datetime import timedelta
from urllib.parse import urlsplit

import torch
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from zif.contract import Communicator, CommunicatorError, CommunicatorGroup
from zif_conformance.reference_platform.faults import FaultInjector

_SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)
_FIRST_NAP_S, _LONGEST_NAP_S = 0.00005, 0.005


class StoreCommunicator(Communicator):
    """One rank's membership in a group. Construction meets the other ranks."""

    def __init__(self, group: CommunicatorGroup, faults: FaultInjector) -> None:
        self.group = group
        self._faults = faults
        self._unusable = ""
        self._num_exchanges = 0
        self._num_messages: defaultdict[str, int] = defaultdict(int)
        self._server, self._store = _meet(group)
        try:
            self._announce("joined")
        except CommunicatorError:
            self.abort()
            raise

    def all_reduce(self, array: torch.Tensor) -> torch.Tensor:
        return _sum(self._exchange("all_reduce", array))

    def all_gather(self, array: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange("all_gather", array))

    def reduce_scatter(self, array: torch.Tensor) -> torch.Tensor:
        self._check_divisible("reduce_scatter", array)
        return _sum([self._own_part(part) for part in self._exchange("reduce_scatter", array)])

    def all_to_all(self, array: torch.Tensor) -> torch.Tensor:
        self._check_divisible("all_to_all", array)
        return torch.cat([self._own_part(part) for part in self._exchange("all_to_all", array)])

    def broadcast(self, array: torch.Tensor, source: int) -> torch.Tensor:
        self._check_rank("broadcast", source)
        return self._exchange(f"broadcast from {source}", array)[source]

    def send(self, array: torch.Tensor, target: int) -> None:
        self._check_rank("send", target)
        self._begin("send")
        self._put(self._message(self.group.rank, target), _packed("send", array))

    def receive(self, array: torch.Tensor, source: int) -> torch.Tensor:
        self._check_rank("receive", source)
        self._begin("receive")
        key = self._message(source, self.group.rank)
        received = self._unpacked("receive", self._wait_for("receive", key), _packed("send", array))
        self._store.delete_key(key)
        return received

    def barrier(self) -> None:
        self._exchange("barrier", torch.zeros(1))

    def abort(self) -> None:
        self._unusable = self._unusable or "it was aborted"
        self._server = None

    def close(self) -> None:
        if self._unusable:
            return
        self._put(f"left/{self.group.rank}", b"yes")
        if self._server is not None:
            # The others may still have to read what is kept here: it goes when they have left, or the deadline.
            threading.Thread(target=_outlive, args=(self._server, self._store, self.group)).start()
        self._unusable = "it is closed"
        self._server = None

    def _exchange(self, operation: str, array: torch.Tensor) -> list[torch.Tensor]:
        """Give every rank the arrays of all ranks. Raises `CommunicatorError` when they do not agree what they do."""
        self._begin(operation)
        group, number = self.group, self._num_exchanges
        self._num_exchanges += 1
        own = _packed(operation, array)
        self._put(f"{number}/{group.rank}", own)
        contents = [self._wait_for(operation, f"{number}/{rank}") for rank in range(group.world_size)]
        if number:  # Who has come here has read the exchange before, so all have.
            self._store.delete_key(f"{number - 1}/{group.rank}")
        return [self._unpacked(operation, content, own) for content in contents]

    def _announce(self, what: str) -> None:
        self._put(f"{what}/{self.group.rank}", b"yes")
        for rank in range(self.group.world_size):
            self._wait_for("joining", f"{what}/{rank}")

    def _begin(self, operation: str) -> None:
        if self._unusable:
            raise self._error(operation, self._unusable)
        self._faults.collective()

    def _put(self, key: str, content: bytes) -> None:
        try:
            self._store.set(key, content)  # type: ignore[arg-type] # it takes bytes, too
        except RuntimeError as error:  # torch's store and network errors are all of this kind
            self._unusable = f"the store is gone: {error}"
            raise self._error("writing", self._unusable) from error

    def _wait_for(self, operation: str, key: str) -> bytes:
        """Return what a rank has put under `key`, as soon as it is there."""
        deadline, nap = time.monotonic() + self.group.deadline_s, _FIRST_NAP_S
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    self._unusable = f"{key!r} did not come within {self.group.deadline_s} s: a rank is late or gone"
                if self._unusable:
                    raise self._error(operation, self._unusable)
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_NAP_S)
            return bytes(self._store.get(key))
        except RuntimeError as error:
            self._unusable = f"the store is gone: {error}"
            raise self._error(operation, self._unusable) from error

    def _unpacked(self, operation: str, content: bytes, expected: bytes) -> torch.Tensor:
        """Return the array in `content`, which must be like the one in `expected`."""
        header, _, data = content.partition(b"\n")
        if header != expected.partition(b"\n")[0]:
            self._unusable = f"another rank came with {header.decode()}"
            raise self._error(operation, self._unusable)
        _, name, shape = json.loads(header)
        dtype = getattr(torch, name)
        # torch makes no tensor of an empty buffer.
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    def _message(self, source: int, target: int) -> str:
        """Name the next message from one rank to another."""
        pair = f"{source}-{target}"
        self._num_messages[pair] += 1
        return f"message/{pair}/{self._num_messages[pair]}"

    def _own_part(self, array: torch.Tensor) -> torch.Tensor:
        return array.chunk(self.group.world_size)[self.group.rank]

    def _check_rank(self, operation: str, rank: int) -> None:
        if not 0 <= rank < self.group.world_size:
            raise ValueError(f"{operation}: rank {rank!r} is not one of 0 to {self.group.world_size - 1}")

    def _check_divisible(self, operation: str, array: torch.Tensor) -> None:
        if array.shape[0] % self.group.world_size:
            raise ValueError(
                f"{operation}: the first axis has {array.shape[0]} elements, which world_size="
                f"{self.group.world_size} does not divide"
            )

    def _error(self, operation: str, reason: str) -> CommunicatorError:
        group = self.group
        return CommunicatorError(
            f"{operation} on rank {group.rank} of {group.world_size} in group {group.name!r}: {reason}; "
            "open a new group"
        )


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    """Add the ranks' arrays in rank order, so that every rank gets the same bits."""
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype in _SUMMED_IN_FLOAT32 else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def _packed(operation: str, array: torch.Tensor) -> bytes:
    """Return an array as bytes after a line that says what it is and what it is for."""
    header = json.dumps([operation, str(array.dtype).removeprefix("torch."), list(array.shape)])
    return header.encode() + b"\n" + array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _meet(group: CommunicatorGroup) -> tuple[Store | None, Store]:
    """Open the group's store. Returns the server, on the rank that holds it, and the store itself."""
    place, deadline = urlsplit(group.rendezvous), timedelta(seconds=group.deadline_s)
    try:
        if place.scheme == "file" and place.path:
            return None, PrefixStore(group.name, FileStore(place.path, group.world_size))
        if place.scheme == "tcp" and place.hostname and place.port:
            is_server = group.rank == 0
            store = TCPStore(
                place.hostname, place.port, group.world_size, is_server, timeout=deadline, wait_for_workers=False
            )
            return store if is_server else None, PrefixStore(group.name, store)
    except RuntimeError as error:
        raise CommunicatorError(
            f"rank {group.rank} of {group.world_size} could not join group {group.name!r} at {group.rendezvous!r} "
            f"within {group.deadline_s} s: {error}; check that all ranks run and can reach each other"
        ) from error
    raise CommunicatorError(f"rendezvous {group.rendezvous!r} must be tcp://host:port or file:///path")


def _outlive(server: Store, store: Store, group: CommunicatorGroup) -> None:
    """Keep `server` until every rank has left, for the deadline at most."""
    deadline = time.monotonic() + group.deadline_s
    keys = [f"left/{rank}" for rank in range(group.world_size)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(_LONGEST_NAP_S)
    del server
