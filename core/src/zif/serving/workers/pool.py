"""A few workers, and a bounded line before them: what HTTP handlers call for work that strangers shape.

A worker that exceeds a limit is killed and replaced, and only the request that it worked on fails.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from zif.contract import StructuredOutput
from zif.errors import RequestError
from zif.serving.answers import EngineUnavailableError, OverloadedError
from zif.serving.workers.messages import (
    MAX_TASK_BYTES,
    GrammarCost,
    GrammarTask,
    Outcome,
    OutcomeKind,
    RenderTask,
    Task,
    TaskName,
    WorkerSetup,
    encoded,
)
from zif.serving.workers.worker import Worker, WorkerLostError, start_worker
from zif.text.chat import ChatOptions, ChatTemplates

_log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_START_ATTEMPTS = 3
RETRY_AFTER_S = 1.0
MAX_COMPILE_S = 0.3
"""Of the processor. A step of the engine may wait while a form is compiled there; one that costs more is refused."""


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """Whose tokens grammars are compiled for: the folder of a tokenizer, the width of logits, what ends an answer."""

    folder: str
    vocab_size: int
    eos_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one task may take, and how many wait. Memory is what it needs beyond the idle worker's."""

    time_s: float = 2.0
    memory_bytes: int = 256 << 20
    max_waiting: int = 256
    start_s: float = 60.0


@dataclass(slots=True)
class _Line:
    """The workers that are idle, and how many callers wait for one. None in `idle` tells one of them to give up."""

    idle: asyncio.Queue[Worker | None] = field(default_factory=asyncio.Queue)
    num_waiting: int = 0


class WorkerPool:
    """Workers of one model. Start it on the loop that uses it; close it there. `vocabulary` None: no grammars."""

    def __init__(
        self, vocabulary: GrammarVocabulary | None, num_workers: int = 2, limits: WorkerLimits | None = None
    ) -> None:
        self._limits = limits or WorkerLimits()
        self._vocabulary = vocabulary
        self._num_workers = num_workers
        self._line = _Line()
        self._workers: set[Worker] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        self._closed = False
        self.num_killed = 0

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers that run."""
        return sorted(worker.pid for worker in self._workers)

    async def start(self) -> None:
        """Start the workers and wait for them. Raises `EngineUnavailableError` with the reason when none gets ready."""
        for _ in range(self._num_workers):
            self._start_one()
        await asyncio.gather(*self._starting)
        if not self._workers:
            raise self._unavailable()

    async def close(self) -> None:
        """End every worker. Tasks under way fail. Idempotent."""
        self._closed = True
        for _ in range(self._line.num_waiting):
            self._line.idle.put_nowait(None)
        starting = list(self._starting)
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        workers, self._workers = list(self._workers), set()
        await asyncio.gather(*(worker.kill() for worker in workers))

    async def check_grammar(self, form: StructuredOutput) -> GrammarCost:
        """Compile a form within the limits. Raises `RequestError` with the reason when it must not reach an engine."""
        cost = await self.run(TaskName.CHECK_GRAMMAR, GrammarTask(form), GrammarCost)
        if cost.compile_s > MAX_COMPILE_S:
            raise RequestError(
                f"{form.kind.value} takes {cost.compile_s:.2f} s to compile; the limit is {MAX_COMPILE_S}; simplify it"
            )
        return cost

    async def render(
        self, templates: ChatTemplates, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> str:
        """Render messages as `zif.text.chat.render_chat` does, within the limits."""
        tools = None if options.tools is None else [dict(tool) for tool in options.tools]
        task = RenderTask(
            dict(templates.sources),
            dict(templates.special_tokens),
            [dict(message) for message in messages],
            options.add_generation_prompt,
            options.continue_final_message,
            tools,
            dict(options.variables),
        )
        return await self.run(TaskName.RENDER_TEMPLATE, task, str)

    async def run(self, name: TaskName, payload: msgspec.Struct, result: type[R]) -> R:
        """Have a task done by the next idle worker; cancelling ends the task.

        Raises `RequestError` when the request is wrong or exceeds a limit, `OverloadedError` when too many wait,
        `EngineUnavailableError` when there is no worker.
        """
        task = Task(name, _encoded(name, payload))
        await asyncio.sleep(0)  # a long one took a while, and takes as long again to be written
        worker = await self._take()
        try:
            async with asyncio.timeout(self._limits.time_s):
                outcome = await worker.call(task)
        except TimeoutError as error:
            await self._replace(worker)
            raise RequestError(
                f"{name.value} took longer than {self._limits.time_s} s and was ended; send something simpler"
            ) from error
        except WorkerLostError as error:
            await self._replace(worker)
            if self._closed:
                raise self._unavailable() from error
            raise RequestError(
                f"{name.value} was ended: it needed more than {self._limits.memory_bytes >> 20} MiB or broke its "
                "worker; send something simpler"
            ) from error
        except BaseException:
            await self._replace(worker)
            raise
        self._line.idle.put_nowait(worker)
        return _result(name, outcome, result)

    async def _take(self) -> Worker:
        line = self._line
        if self._closed:
            raise self._unavailable()
        # Where workers could not be started, for want of memory perhaps, it is tried again for who needs one.
        for _ in range(self._num_workers - len(self._workers) - len(self._starting)):
            self._start_one()
        if line.num_waiting >= self._limits.max_waiting:
            raise OverloadedError(f"{line.num_waiting} requests wait for a worker; come again later", RETRY_AFTER_S)
        line.num_waiting += 1
        try:
            async with asyncio.timeout(self._limits.start_s):
                while (worker := await line.idle.get()) is not None:
                    if worker.is_running():
                        return worker
                    await self._replace(worker)
            raise self._unavailable()
        except TimeoutError as error:
            raise self._unavailable() from error
        finally:
            line.num_waiting -= 1

    async def _replace(self, worker: Worker) -> None:
        self.num_killed += 1
        self._workers.discard(worker)
        if not self._closed:
            self._start_one()
        await worker.kill()

    def _start_one(self) -> None:
        task = asyncio.get_running_loop().create_task(self._start())
        self._starting.add(task)
        task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        if not self._workers and not self._starting and not self._closed:
            for _ in range(self._line.num_waiting):  # nobody will come for those who wait
                self._line.idle.put_nowait(None)

    async def _start(self) -> None:
        for _ in range(MAX_START_ATTEMPTS):
            try:
                async with asyncio.timeout(self._limits.start_s):
                    worker = await start_worker(self._setup())
            except (WorkerLostError, OSError, TimeoutError) as error:
                self._failure = str(error) or type(error).__name__
                _log.error("a worker did not start: %s", self._failure)
                continue
            self._workers.add(worker)
            self._line.idle.put_nowait(worker)
            return

    def _setup(self) -> WorkerSetup:
        limits, vocabulary = self._limits, self._vocabulary
        if vocabulary is None:
            return WorkerSetup(os.getpid(), limits.time_s, limits.memory_bytes)
        return WorkerSetup(
            os.getpid(),
            limits.time_s,
            limits.memory_bytes,
            vocabulary.folder,
            vocabulary.vocab_size,
            list(vocabulary.eos_ids),
        )

    def _unavailable(self) -> EngineUnavailableError:
        reason = "the server is closing" if self._closed else f"no worker runs ({self._failure or 'none was started'})"
        return EngineUnavailableError(f"templates and grammars are not served now: {reason}", RETRY_AFTER_S)


def _encoded(name: TaskName, payload: msgspec.Struct) -> bytes:
    try:
        data = encoded(payload)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError(f"{name.value} cannot take this request: {type(error).__name__}: {error}") from error
    if len(data) > MAX_TASK_BYTES:
        raise RequestError(f"{name.value}: the request has {len(data)} bytes; the limit is {MAX_TASK_BYTES}")
    return data


def _result(name: TaskName, outcome: Outcome, result: type[R]) -> R:
    if outcome.kind is OutcomeKind.REFUSED:
        raise RequestError(outcome.reason)
    if outcome.kind is OutcomeKind.FAILED:
        raise RuntimeError(f"{name.value} failed: {outcome.reason}")
    return msgspec.msgpack.decode(outcome.value, type=result)
