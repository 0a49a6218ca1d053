"""`ProcessEngine`: the engine as HTTP handlers see it, in a process that is watched and started again when it crashes.

All methods run on one event loop, on the thread that called `start`.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.serving.answers import (
    AnswerDelta,
    EnginePrompt,
    EngineState,
    EngineStats,
    EngineUnavailableError,
    ModelInfo,
    OverloadedError,
)
from zif.serving.engine.admission import Admission, capacity_of
from zif.serving.engine.child import EngineChild
from zif.serving.engine.limits import ProcessOptions
from zif.serving.engine.messages import (
    Abort,
    Compiling,
    Deltas,
    Done,
    Drain,
    Draining,
    FromEngine,
    MessageError,
    Overloaded,
    Ready,
    Refused,
    ResetPrefixCache,
    Starting,
    Stats,
    Submit,
    Unavailable,
    shortened,
)
from zif.serving.engine.outstanding import OutstandingRequests
from zif.serving.engine.progress import HangTimer, ProgressWatch
from zif.serving.engine.streams import AnswerStream
from zif.serving.engine.supervision import RestartPolicy
from zif.serving.engine.totals import TotalsOverRestarts
from zif.settings import EngineSettings

logger = logging.getLogger(__name__)

OnPhase = Callable[[str, int, int], None]
"""Called with (phase, units done, total units) while an engine starts, again while nothing changes."""

_RETRY_S = 5.0
"""What callers are told while an engine starts."""

_LOOK_S = 1.0
"""How often a hung engine is looked for; the limits of a hang are longer."""


class ProcessEngine:
    """An `EngineClient` whose engine runs in a process of its own.

    `start` returns at once and `wait_ready` when the engine takes requests. `drain` ends it when what runs is finished,
    `close` now; use it as an asynchronous context manager to have it closed.
    """

    def __init__(
        self, settings: EngineSettings, options: ProcessOptions | None = None, on_phase: OnPhase | None = None
    ) -> None:
        self._settings = settings
        self._options = options or ProcessOptions()
        self._on_phase = on_phase or _log_phase
        self._policy = RestartPolicy(self._options.restarts)
        self._progress = ProgressWatch(self._options.limits.step_limit_s)
        self._totals = TotalsOverRestarts()
        self._state = EngineState.STARTING
        self._phase = ""
        self._failure = ""
        self._info: ModelInfo | None = None
        self._stats: EngineStats | None = None
        self._requests = OutstandingRequests()
        self._waiting_for_done: dict[int, asyncio.Future[None]] = {}
        self._child: EngineChild | None = None
        self._stops = False
        self._changed = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Deltas: self._take_deltas,
            Stats: self._take_stats,
            Compiling: self._take_compiling,
            Starting: self._take_phase,
            Ready: self._take_ready,
            Draining: self._take_draining,
            Done: self._take_done,
            Refused: self._take_refused,
            Overloaded: self._take_overloaded,
            Unavailable: self._take_unavailable,
        }

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise self._unavailable()
        return self._info

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    @property
    def num_outstanding(self) -> int:
        """Count the requests that the engine has not ended, aborted ones included."""
        return len(self._requests)

    @property
    def pid(self) -> int | None:
        """Return the engine's process id, None when there is none."""
        return self._child.pid if self._child else None

    async def start(self) -> None:
        """Start the engine's process and watch over it; `wait_ready` says how that went."""
        assert self._supervisor is None, "start is called twice"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> None:
        """Wait until the engine takes requests. Raises `EngineUnavailableError` when it never will."""
        while self._state is not EngineState.READY:
            if self._state is EngineState.FAILED or self._stops:
                raise self._unavailable()
            self._changed.clear()
            await self._changed.wait()

    def problem(self) -> str | None:
        if self._state is not EngineState.READY:
            return self._standing()
        # A busy event loop may not have come to what has arrived.
        if self._child is not None:
            self._child.read()
        if self._state is not EngineState.READY:
            return self._standing()
        return self._progress.problem(bool(self._requests))

    def check_room(self) -> None:
        if self._state is EngineState.READY:
            self._requests.check_room(1, 1)

    async def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        stream = self._submit(prompt, sampling, priority)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finished:
                    return
        finally:
            if not stream.ended and stream in self._requests:
                # Counted until the engine has ended it: a hung engine does not take ever more requests.
                stream.abandon()
                if self._child is not None:
                    self._child.send(Abort(stream.id))

    async def reset_prefix_cache(self) -> None:
        """Forget every computed prefix. Raises `EngineUnavailableError` when there is no engine to do it."""
        self._require_ready()
        message = ResetPrefixCache(secrets.randbits(63))
        done = self._waiting_for_done[message.id] = asyncio.get_running_loop().create_future()
        try:
            self._send(message)
            await done
        finally:
            self._waiting_for_done.pop(message.id, None)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Take no more requests, wait until those under way are finished, or for `timeout_s`, and end the engine."""
        self._stops = True
        child = self._child
        if child is None or self._state not in (EngineState.READY, EngineState.DRAINING):
            await self.close()
            return
        self._set_state(EngineState.DRAINING)
        self._send(Drain(abort=False))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(child.ended), timeout_s)
        await self.close()

    async def close(self) -> None:
        """End the engine, requests under way included. Idempotent."""
        self._stops = True
        child, supervisor = self._child, self._supervisor
        if child is not None and not child.ended.done():
            if self._state in (EngineState.READY, EngineState.DRAINING) and child.send(Drain(abort=True)):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(child.ended), self._options.limits.close_s)
            child.kill("the engine is closed")
            await child.ended
        if supervisor is not None:
            supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor
        self._child = None
        self._fail_all("the engine is closed")
        if self._state is not EngineState.FAILED:
            self._failure = "it is closed"
            self._set_state(EngineState.FAILED)

    async def __aenter__(self) -> "ProcessEngine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _supervise(self) -> None:
        """Start the engine, and again after each crash, until it is stopped or a crash loop is seen."""
        while not self._stops:
            try:
                self._child = self._spawn()
            except Exception as error:  # whatever it is, waiting for an engine would be for ever
                self._give_up(f"the engine process cannot be started: {error}")
                return
            was_ready = await self._end_of(self._child)
            reason = self._child.ended.result()
            was_draining = self._state is EngineState.DRAINING
            self._child = None
            self._stats = None  # a dead engine has no load
            self._totals.begin_anew()
            self._fail_all(reason)
            if self._stops or was_draining:
                self._failure = "it was drained"
                self._set_state(EngineState.FAILED)
                return
            delay_s = self._policy.delay_after_crash()
            # What fails at the first start (a wrong path, too little memory) fails again.
            if self._info is None or delay_s is None:
                self._give_up(reason)
                return
            kind = "crashed" if was_ready else "did not start"
            logger.error("the engine %s and is started again in %.1f s: %s", kind, delay_s, reason)
            self._set_state(EngineState.RESTARTING)
            await asyncio.sleep(delay_s)

    async def _end_of(self, child: EngineChild) -> bool:
        """Wait until the engine has ended, and end it when it stays hung. Say whether it had taken requests."""
        limits, was_ready = self._options.limits, False
        hang = HangTimer(limits.kill_hung_s, period_s := min(_LOOK_S, limits.step_limit_s))
        while not child.ended.done():
            await asyncio.wait([child.ended], timeout=period_s)
            is_up = self._state in (EngineState.READY, EngineState.DRAINING)
            was_ready = was_ready or is_up
            problem = self._progress.problem(bool(self._requests)) if is_up else None
            if hang.look(has_problem=problem is not None):
                logger.error("the engine is killed: %s", problem)
                # Told now: a process that waits for a device in the kernel may outlive its own end.
                self._fail_all(f"it was hung and is killed: {problem}")
                if self._state is EngineState.READY:
                    self._set_state(EngineState.RESTARTING)
                child.kill(f"it was hung: {problem}")
        return was_ready

    def _spawn(self) -> EngineChild:
        return EngineChild(self._settings, self._options, self._hear)

    def _give_up(self, reason: str) -> None:
        num_crashes = self._policy.num_recent_crashes
        self._failure = reason if num_crashes < 2 else f"{num_crashes} crashes in a short time, the last: {reason}"
        logger.error("the engine failed: %s", self._failure)
        self._set_state(EngineState.FAILED)

    def _submit(self, prompt: EnginePrompt, sampling: SamplingParams, priority: int) -> AnswerStream:
        self._require_ready()
        stream = self._requests.open(sampling.n, len(prompt.token_ids))
        # The text is of no use to an engine that has the tokens.
        sent = prompt if prompt.text is None else msgspec.structs.replace(prompt, text=None)
        try:
            self._send(Submit(stream.id, sent, sampling, priority))
        except MessageError as error:
            raise RequestError(f"the request is too large: {error}") from error
        if not self._requests:
            self._progress.begin()
        self._requests.add(stream)
        return stream

    def _send(self, message: Submit | ResetPrefixCache | Drain) -> None:
        if self._child is None or not self._child.send(message):
            raise EngineUnavailableError("the engine's process is gone", _RETRY_S)

    def _hear(self, message: FromEngine) -> None:
        self._progress.heard()
        self._handlers[type(message)](message)

    def _take_deltas(self, message: Deltas) -> None:
        self._progress.moved()
        for request_id, delta in message.batch:
            self._requests.take(request_id, delta)

    def _take_stats(self, message: Stats) -> None:
        stats = self._totals.take(message.stats)
        if self._stats is None or stats.num_steps != self._stats.num_steps:
            self._progress.moved()
        self._stats = stats

    def _take_compiling(self, message: Compiling) -> None:
        self._progress.moved()

    def _take_phase(self, message: Starting) -> None:
        self._phase = f"{message.phase}, {message.done} of {message.total}"
        self._on_phase(message.phase, message.done, message.total)

    def _take_ready(self, message: Ready) -> None:
        limits = self._options.limits
        self._info = message.info
        self._requests.admission = Admission(capacity_of(message.info, limits.max_queued, limits.max_queued_tokens))
        self._progress.begin()
        if not self._stops:
            self._set_state(EngineState.READY)

    def _take_draining(self, message: Draining) -> None:
        self._set_state(EngineState.DRAINING)

    def _take_done(self, message: Done) -> None:
        done = self._waiting_for_done.get(message.id)
        if done is not None and not done.done():
            done.set_result(None)

    def _take_refused(self, message: Refused) -> None:
        self._fail(message.id, RequestError(message.message))

    def _take_overloaded(self, message: Overloaded) -> None:
        self._fail(message.id, OverloadedError(message.message, message.retry_after_s))

    def _take_unavailable(self, message: Unavailable) -> None:
        self._fail(message.id, EngineUnavailableError(message.message))

    def _fail(self, request_id: int, error: Exception) -> None:
        self._progress.moved()
        self._requests.fail(request_id, error)

    def _fail_all(self, reason: str) -> None:
        """Tell everyone who waits that nothing more will come."""
        self._requests.fail_all(reason, _RETRY_S)
        for done in self._waiting_for_done.values():
            if not done.done():
                done.set_exception(EngineUnavailableError(f"the engine ended: {reason}", _RETRY_S))

    def _require_ready(self) -> None:
        if self._state is not EngineState.READY:
            raise self._unavailable()

    def _unavailable(self) -> EngineUnavailableError:
        may_return = self._state in (EngineState.STARTING, EngineState.RESTARTING)
        return EngineUnavailableError(self._standing(), _RETRY_S if may_return else None)

    def _standing(self) -> str:
        """Say where an engine stands that is not ready."""
        if self._state is EngineState.FAILED:
            return f"the engine is down: {self._failure}"
        if self._state is EngineState.DRAINING:
            return "the engine finishes what it has and takes no more requests"
        doing = "starts" if self._state is EngineState.STARTING else "crashed and is started again"
        return f"the engine {doing}" + (f": {self._phase}" if self._phase else "")

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._changed.set()


def _log_phase(phase: str, done: int, total: int) -> None:
    logger.info("%s", shortened(f"{phase}: {done} of {total}"))
