"""Rank processes from outside: start them, give all of them a task, collect what comes back, replace the dead.

What a rank raises comes back as a value, because tests of faults ask who has raised what. A rank that gives no answer
in time is killed and its answer is `Silent`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self

from zif.contract import CommunicatorGroup
from zif_conformance.ranks import work

START_S = 60.0
ANSWER_S = 30.0
DEADLINE_S = 15.0
_MICROSECONDS = 1e6


class Silent(Exception):
    """The rank gave no answer: it was killed, or its process had ended."""


@dataclass(slots=True)
class _Process:
    process: SpawnProcess
    connection: Connection


@dataclass(slots=True)
class Fleet:
    """`size` ranks of one platform. `folder` holds the files at which groups meet."""

    platform: str
    size: int
    folder: Path
    _processes: list[_Process] = field(default_factory=list)
    _num_groups: int = 0

    def __enter__(self) -> Self:
        self._processes = [self._start(rank) for rank in range(self.size)]
        for answer in self._collect(range(self.size), START_S):
            if isinstance(answer, BaseException):
                self.__exit__()
                raise answer
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._processes:
            held.connection.close()
        for held in self._processes:
            held.process.join(5.0)
            if held.process.is_alive():
                held.process.kill()
                held.process.join()

    def ask(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int] = ()
    ) -> list[Any]:
        """Let each of the ranks (none named: all) run `task` with its own arguments; returns values or exceptions."""
        chosen = self.begin(task, arguments, ranks)
        return self._collect(chosen, ANSWER_S)

    def begin(
        self, task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int] = ()
    ) -> Sequence[int]:
        """Give the task out and return whom it went to; `answers` collects."""
        chosen = tuple(ranks) or tuple(range(self.size))
        for rank, own in zip(chosen, arguments, strict=True):
            self._processes[rank].connection.send((task, own))
        return chosen

    def answers(self, ranks: Sequence[int]) -> list[Any]:
        """Collect what was begun."""
        return self._collect(ranks, ANSWER_S)

    def revive(self) -> None:
        """Start anew the ranks whose processes have ended."""
        for rank, held in enumerate(self._processes):
            if not held.process.is_alive():
                held.connection.close()
                self._processes[rank] = self._start(rank)
                for answer in self._collect([rank], START_S):
                    assert not isinstance(answer, BaseException), answer

    def new_group(self, size: int = 0, deadline_s: float = DEADLINE_S) -> list[CommunicatorGroup]:
        """Return the memberships of a group that nobody has joined yet, by rank in the group."""
        self._num_groups += 1
        name = f"group-{self._num_groups}"
        place = f"file://{self.folder}/{name}-{int(time.time() * _MICROSECONDS)}"
        return [
            CommunicatorGroup(name, rank, size or self.size, place, deadline_s) for rank in range(size or self.size)
        ]

    def joined(self, ranks: Sequence[int] = (), deadline_s: float = DEADLINE_S) -> str:
        """Let ranks (none named: all) join a new group, in this order, and return its name."""
        chosen = tuple(ranks) or tuple(range(self.size))
        groups = self.new_group(len(chosen), deadline_s)
        for answer in self.ask(work.join, [(group,) for group in groups], chosen):
            assert not isinstance(answer, BaseException), answer
        return groups[0].name

    def run(self, name: str, steps: Sequence[work.Step], ranks: Sequence[int] = ()) -> list[Any]:
        """Let the members of a group do the same program."""
        chosen = tuple(ranks) or tuple(range(self.size))
        return self.ask(work.take_part, [(name, steps)] * len(chosen), chosen)

    def _start(self, rank: int) -> _Process:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work.serve, args=(theirs, self.platform, rank), daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def _collect(self, ranks: Sequence[int], seconds: float) -> list[Any]:
        deadline, found = time.monotonic() + seconds, []
        for rank in ranks:
            held = self._processes[rank]
            try:
                if not held.connection.poll(max(0.0, deadline - time.monotonic())):
                    held.process.kill()
                    held.process.join()
                    raise Silent(f"rank {rank} gave no answer within {seconds:.0f} s")
                found.append(held.connection.recv()[1])
            except (EOFError, OSError):
                held.process.join()
                found.append(Silent(f"the process of rank {rank} ended with exit code {held.process.exitcode}"))
            except Silent as silent:
                found.append(silent)
        return found
