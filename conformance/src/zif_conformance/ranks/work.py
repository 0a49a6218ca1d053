"""What one rank does, in its own process: join groups, take part in collectives, misbehave when told to.

A task is a function of `Rank` and picklable arguments. `serve` runs tasks until the pipe is closed. Arrays travel as
host tensors; they are on the rank's device while a task runs.
"""

import os
import pickle
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from zif.contract import Communicator, CommunicatorGroup, Device
from zif_conformance.subject import Subject


@dataclass(slots=True)
class Rank:
    """One rank: its device, and the groups that it has joined, by name."""

    number: int
    device: Device
    groups: dict[str, Communicator] = field(default_factory=dict)

    def array(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device, strides and all."""
        device = self.device.array_device
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


@dataclass(frozen=True, slots=True)
class Step:
    """One collective of a program. `arrays` holds each rank's argument, host tensors; `peer` a source or target."""

    operation: str
    arrays: tuple[torch.Tensor, ...]
    peer: int = 0
    late_s: float = 0.0


def join(rank: Rank, group: CommunicatorGroup) -> None:
    """Join a group."""
    rank.groups[group.name] = rank.device.communicator(group)


def take_part(rank: Rank, name: str, steps: Sequence[Step]) -> list[torch.Tensor | None]:
    """Do this rank's part of a program; returns what each step gave, on the host.

    Raises `AssertionError` when an argument was changed (clause 11.3).
    """
    group, results = rank.groups[name], []
    own = group.group.rank
    for step in steps:
        time.sleep(step.late_s)
        given = rank.array(step.arrays[own])
        result = _call(group, step, given)
        rank.device.synchronize()
        before = step.arrays[own]
        same = torch.equal(_bits(given.cpu()), _bits(before))
        assert same, f"{step.operation} changed its argument"
        results.append(None if result is None else result.cpu())
    return results


def leave(rank: Rank, name: str, how: str, times: int = 1) -> None:
    """Call `close` or `abort` of a group so many times."""
    for _ in range(times):
        getattr(rank.groups[name], how)()


def pause(rank: Rank, seconds: float) -> None:
    """Do nothing for a while."""
    time.sleep(seconds)


def die(rank: Rank) -> None:
    """End this process at once, as a machine that loses its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def serve(connection: Connection, platform: str, number: int) -> None:
    """Open a device and run the tasks that come through the pipe. Answers ("result", value) or ("error", exception)."""
    torch.set_num_threads(1)
    try:
        subject = Subject.find(platform)
        with subject.opened(rank=number) as device:
            connection.send(("result", None))
            rank = Rank(number, device)
            while (task := _next(connection)) is not None:
                connection.send(_outcome(rank, *task))
    except Exception as error:
        connection.send(_picklable(error))


def _next(connection: Connection) -> tuple[Any, tuple[Any, ...]] | None:
    try:
        task: tuple[Any, tuple[Any, ...]] = connection.recv()
        return task
    except EOFError:
        return None


def _outcome(rank: Rank, task: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "result", task(rank, *arguments)
    except Exception as error:
        return _picklable(error)


def _picklable(error: Exception) -> tuple[str, Exception]:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return "error", RuntimeError(f"{type(error).__name__}: {error}")
    return "error", error


def _call(group: Communicator, step: Step, array: torch.Tensor) -> torch.Tensor | None:
    match step.operation:
        case "barrier":
            group.barrier()
            return None
        case "broadcast":
            return group.broadcast(array, step.peer)
        case "shift":
            return _shift(group, array)
        case "send":
            group.send(array, step.peer)
            return None
        case "receive":
            return group.receive(array, step.peer)
        case _:
            result: torch.Tensor = getattr(group, step.operation)(array)
            return result


def _shift(group: Communicator, array: torch.Tensor) -> torch.Tensor:
    """Send to the next rank and receive from the one before, first rank first, as pipelines do."""
    rank, size = group.group.rank, group.group.world_size
    target, source = (rank + 1) % size, (rank - 1) % size
    if rank == 0:
        group.send(array, target)
        return group.receive(array, source)
    received = group.receive(array, source)
    group.send(array, target)
    return received


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
