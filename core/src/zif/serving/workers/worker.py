"""One worker as its pool sees it: a process, and one task at a time on its pipes."""

import asyncio
import contextlib
import sys

import msgspec

from zif.serving.workers.messages import FRAME_HEADER, MAX_FRAME_BYTES, Outcome, OutcomeKind, Task, WorkerSetup, frame

_COMMAND = ("-P", "-m", "zif.serving.workers.child")


class WorkerLostError(Exception):
    """A worker ended without an answer: killed by a limit of the kernel, by a signal, or by native code."""


class Worker:
    """A running worker. Made by `start_worker`; after any exception of `call` it must be killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._outcomes = msgspec.msgpack.Decoder(Outcome)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def is_running(self) -> bool:
        """Say whether the process has not ended, as far as this process was told."""
        return self._process.returncode is None

    async def call(self, task: Task) -> Outcome:
        """Have a task done. Raises `WorkerLostError`."""
        return await self._exchange(task)

    async def begin(self, setup: WorkerSetup) -> Outcome:
        """Set the worker up. Raises `WorkerLostError`."""
        return await self._exchange(setup)

    async def kill(self) -> None:
        """End the process at once and wait until it is gone. Harmless when it is."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()

    async def _exchange(self, message: Task | WorkerSetup) -> Outcome:
        sender, receiver = self._process.stdin, self._process.stdout
        assert sender is not None, "workers are started with pipes"
        assert receiver is not None, "workers are started with pipes"
        try:
            sender.write(frame(message))
            await sender.drain()
            (size,) = FRAME_HEADER.unpack(await receiver.readexactly(FRAME_HEADER.size))
            if size > MAX_FRAME_BYTES:
                raise WorkerLostError(f"it answered with {size} bytes")
            return self._outcomes.decode(await receiver.readexactly(size))
        except (asyncio.IncompleteReadError, OSError, msgspec.DecodeError) as error:
            raise WorkerLostError(f"it ended without an answer ({type(error).__name__})") from error


async def start_worker(setup: WorkerSetup) -> Worker:
    """Start a worker and wait until it is ready. Raises `WorkerLostError` when it does not get there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # What native code prints when it gives up may quote a request.
        stderr=asyncio.subprocess.DEVNULL,
    )
    worker = Worker(process)
    try:
        outcome = await worker.begin(setup)
    except BaseException:
        await worker.kill()
        raise
    if outcome.kind is not OutcomeKind.DONE:
        await worker.kill()
        raise WorkerLostError(outcome.reason)
    return worker
