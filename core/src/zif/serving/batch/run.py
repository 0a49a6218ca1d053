"""A run over a file of requests: many under way at once, each answered once, whatever happens to the engine."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from zif.errors import ConfigError, EngineError
from zif.serving.answers import EngineUnavailableError
from zif.serving.batch.app_calls import AppAnswer, AppCaller
from zif.serving.batch.journal import SYNC_S, Journal
from zif.serving.batch.patience import PatientEngine
from zif.serving.batch.requests import BatchRequest, Fault
from zif.serving.batch.turns import Room, Turns

MAX_ATTEMPTS = 3
"""Of a request that the engine does not outlive, the last one alone: its neighbours are not blamed for it."""

_HELD_PER_RUNNING = 4
"""Where answers keep the order of the input, this many requests are held for each that runs."""

_RETRY_S = 0.5
_SKIPS_PER_TURN = 256
_MAX_SHOWN_FIELDS = 16
_MAX_SHOWN_DUPLICATES = 10


@dataclass(slots=True)
class Tally:
    """What a run gave, counted as it comes."""

    num_answered: int = 0
    num_failed: int = 0
    num_retries: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    unknown_fields: dict[str, None] = field(default_factory=dict)
    began_s: float = field(default_factory=time.monotonic)

    def add(self, answer: AppAnswer | Fault) -> None:
        """Count an answer."""
        self.num_answered += 1
        if isinstance(answer, Fault):
            self.num_failed += 1
            return
        self.num_failed += answer.answer.failed
        self.num_prompt_tokens += answer.record.num_prompt_tokens
        self.num_output_tokens += answer.record.num_output_tokens
        if len(self.unknown_fields) < _MAX_SHOWN_FIELDS:
            self.unknown_fields.update(dict.fromkeys(answer.unknown_fields))

    def begin(self) -> None:
        """Count the time from now on."""
        self.began_s = time.monotonic()

    def rate(self) -> float:
        """Return the output tokens per second so far."""
        return self.num_output_tokens / max(time.monotonic() - self.began_s, 1e-3)

    def summary(self) -> str:
        """Return the line that ends a run."""
        seconds = time.monotonic() - self.began_s
        return (
            f"{self.num_answered} requests, {self.num_failed} failed, {self.num_prompt_tokens} prompt tokens, "
            f"{self.num_output_tokens} output tokens, {seconds:.2f} s, {self.rate():.1f} tokens/s"
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file of requests holds: how many there are, and how many of them were answered before."""

    num_requests: int
    num_done: int


def survey(requests: Iterable[BatchRequest], journal: Journal) -> Survey:
    """Look over a whole file before anything runs. Keeps 16 bytes a request.

    Raises `ConfigError` when a custom_id is there twice, or was answered for another request.
    """
    seen: set[bytes] = set()
    num_done = 0
    twice: list[str] = []
    for request in requests:
        if request.key in seen:
            twice.append(f"line {request.line} repeats the custom_id {request.custom_id!r}")
            if len(twice) == _MAX_SHOWN_DUPLICATES:
                break
            continue
        seen.add(request.key)
        num_done += journal.has(request)
    if twice:
        raise ConfigError(f"{'; '.join(twice)}; give each request its own")
    return Survey(len(seen), num_done)


@dataclass(frozen=True, slots=True)
class RunLimits:
    """How many requests run at once, how many bytes their bodies have, and whether answers keep the requests' order."""

    max_running: int
    max_body_bytes: int
    ordered: bool = False


class BatchRun:
    """One run. `on_answer` hears of each answer that was written."""

    def __init__(
        self, caller: AppCaller, engine: PatientEngine, journal: Journal, tally: Tally, on_answer: Callable[[], None]
    ) -> None:
        self._caller = caller
        self._engine = engine
        self._journal = journal
        self._tally = tally
        self._on_answer = on_answer
        self._turns = Turns()
        self._syncing: asyncio.Task[None] | None = None

    async def run(self, requests: Iterable[BatchRequest], limits: RunLimits) -> None:
        """Answer what the journal does not have.

        Raises `EngineError` when the engine is down for good, `ConfigError` when answers cannot be written. Whatever
        ends it, what was written is kept, and nothing half-answered was.
        """
        self._syncing = asyncio.create_task(self._sync_often())
        try:
            await self._answer_all(requests, limits)
        except EngineUnavailableError as error:
            raise EngineError(
                f"{error}; answers so far are kept: run the same command again when that is mended"
            ) from error
        finally:
            self._syncing.cancel()
            with suppress(asyncio.CancelledError):
                await self._syncing
            self._journal.sync()

    async def _answer_all(self, requests: Iterable[BatchRequest], limits: RunLimits) -> None:
        room = Room(limits.max_running * (_HELD_PER_RUNNING if limits.ordered else 1), limits.max_body_bytes)
        running = asyncio.Semaphore(limits.max_running)
        before: asyncio.Event | None = None
        num_skipped = 0

        async def answer(request: BatchRequest, before: asyncio.Event | None, written: asyncio.Event) -> None:
            async with running:
                given = await self._answer(request)
            if before is not None:
                await before.wait()
            self._write(request, given)
            written.set()
            room.leave(len(request.body))

        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    if self._journal.has(request):
                        num_skipped += 1
                        if num_skipped % _SKIPS_PER_TURN == 0:
                            await asyncio.sleep(0)
                        continue
                    await room.enter(len(request.body))
                    written = asyncio.Event()
                    group.create_task(answer(request, before, written))
                    before = written if limits.ordered else None
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    def _write(self, request: BatchRequest, answer: AppAnswer | Fault) -> None:
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()  # a disk that fails ends the run
        self._journal.write(request, answer if isinstance(answer, Fault) else answer.answer)
        self._tally.add(answer)
        self._on_answer()

    async def _answer(self, request: BatchRequest) -> AppAnswer | Fault:
        if request.fault is not None:
            return request.fault
        if request.url not in self._caller.paths:
            message = f"url {request.url[:100]!r} is none of {', '.join(sorted(self._caller.paths))}"
            return Fault("invalid_url", message, request.line)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            turn = self._turns.alone() if attempt == MAX_ATTEMPTS else self._turns.together()
            async with turn, self._engine.preparing():
                answer = await self._caller.post(request.url, request.body)
            if not answer.may_differ_later:
                break
            # Its end may not be known here yet. One that is down for good ends the run, and no request is blamed.
            await asyncio.sleep(_RETRY_S)
            await self._engine.wait_ready()
            self._tally.num_retries += attempt < MAX_ATTEMPTS
        return answer

    async def _sync_often(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._journal.sync)
