"""The worker process: reads tasks from standard input, answers on standard output, one at a time.

It bounds itself before it takes the first task: memory by a limit of the kernel, time by an alarm whose default action
ends the process even inside native code, files by a limit of nothing. Started by `pool`, as `python -m` of this module.
"""

import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from zif.errors import ZifError
from zif.serving.engine.lifetime import end_with_parent
from zif.serving.workers.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    MAX_OUTPUT_BYTES,
    Outcome,
    OutcomeKind,
    Task,
    TaskName,
    WorkerSetup,
    frame,
)
from zif.serving.workers.tasks import TaskFunction, load_tasks

ALARM_GRACE_S = 1.0
"""The pool kills at the limit; the alarm is for a worker whose pool is gone."""


def main() -> None:
    """Serve tasks until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    # What a library prints must not end up between frames.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    body = _read_frame(0)
    if body is None:
        return
    setup = msgspec.msgpack.decode(body, type=WorkerSetup)
    end_with_parent(setup.parent_pid)
    tasks = load_tasks(setup)
    _limit_resources(setup.memory_limit_bytes)
    _write(answers, Outcome(OutcomeKind.DONE))
    while (body := _read_frame(0)) is not None:
        signal.setitimer(signal.ITIMER_REAL, setup.time_limit_s + ALARM_GRACE_S)
        outcome = _perform(tasks, body)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, outcome)


def _perform(tasks: Mapping[TaskName, TaskFunction], body: bytes) -> Outcome:
    try:
        task = msgspec.msgpack.decode(body, type=Task)
        value = tasks[task.name](task.payload)
    except MemoryError:
        return Outcome(OutcomeKind.REFUSED, reason="it needs more memory than one request may take; send less")
    except RecursionError:
        return Outcome(OutcomeKind.REFUSED, reason="it nests too deeply; send a flatter one")
    except ZifError as error:
        return Outcome(OutcomeKind.REFUSED, reason=str(error))
    except Exception as error:  # a process border: the pool must get an answer whatever strangers' data does
        return Outcome(OutcomeKind.FAILED, reason=f"{type(error).__name__}: {error}"[:500])
    if len(value) > MAX_OUTPUT_BYTES:
        reason = f"the result has {len(value)} bytes; the limit is {MAX_OUTPUT_BYTES}; send shorter messages"
        return Outcome(OutcomeKind.REFUSED, reason=reason)
    return Outcome(OutcomeKind.DONE, value)


def _limit_resources(memory_limit_bytes: int) -> None:
    """Bound what tasks may take beyond what this process holds by now. Memory on Linux only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        limit = _data_bytes() + memory_limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _data_bytes() -> int:
    """Return the private writable memory of this process, which RLIMIT_DATA counts (proc(5): VmData)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


def _read_frame(fd: int) -> bytes | None:
    """Read one frame, None at the end of the stream. Raises `ValueError` for one that is too long."""
    header = _read_exactly(fd, FRAME_HEADER.size)
    if header is None:
        return None
    (size,) = FRAME_HEADER.unpack(header)
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes; the limit is {MAX_FRAME_BYTES}")
    return _read_exactly(fd, size)


def _read_exactly(fd: int, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(fd, min(size - len(pieces), 1 << 16))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


def _write(fd: int, outcome: Outcome) -> None:
    data = memoryview(frame(outcome))
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    main()
