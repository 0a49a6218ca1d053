"""The loop of an engine process: take messages, compute a step, send what is new, say how it stands.

Single-threaded, so that a report is a proof of progress: a hung step sends none; only a step that compiles is vouched
for by a thread (`compile_watch.py`). What is wrong with one request is
answered to that request; an exception out of a step ends the loop.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from zif.engine.generation import Generation
from zif.engine.llm import LLM
from zif.errors import RequestError
from zif.serving.answers import EnginePrompt, EngineStats
from zif.serving.engine.admission import Admission
from zif.serving.engine.block_news import BlockNews
from zif.serving.engine.channel import EngineEnd
from zif.serving.engine.compile_watch import CompileWatch
from zif.serving.engine.deltas import LiveRequest
from zif.serving.engine.messages import (
    Abort,
    Deltas,
    Done,
    Drain,
    Draining,
    FromEngine,
    MessageError,
    Overloaded,
    Refused,
    ResetPrefixCache,
    Stats,
    Submit,
    Unavailable,
)

logger = logging.getLogger(__name__)

_BATCH = 256
"""Requests whose news one message holds, so that no message is long."""


class EngineLoop:
    """Serve one client with one model until it is drained."""

    def __init__(
        self, llm: LLM, end: EngineEnd, admission: Admission, report_s: float, news: BlockNews | None = None
    ) -> None:
        self._llm = llm
        self._engine = llm.engine
        self._engine.outlive_failed_steps()
        self._end = end
        self._admission = admission
        self._report_s = report_s
        self._block_news = news
        self._compile_watch = CompileWatch(end)
        self._next_report_s = 0.0
        self._was_idle = False
        self._draining = False
        self._drain_wanted = False
        self._by_id: dict[int, LiveRequest] = {}
        self._by_generation: dict[Generation, LiveRequest] = {}
        self._news: dict[LiveRequest, None] = {}
        self._outbox: deque[FromEngine] = deque()
        self._handlers: dict[type, Callable[..., None]] = {
            Submit: self._submit,
            Abort: self._abort,
            ResetPrefixCache: self._reset,
            Drain: self._drain,
        }

    def want_drain(self) -> None:
        """Drain from the next turn on. May be called by a signal handler."""
        self._drain_wanted = True

    def run(self) -> None:
        """Serve until drained. Raises what a step raises, and `MessageError` when the client sends nonsense."""
        self._compile_watch.start()
        try:
            while not (self._draining and not self._by_id and not self._wants_to_send()):
                self.turn()
        finally:
            self._compile_watch.close()

    def turn(self) -> None:
        """Take what has come, compute one step, and send what is new; wait when there is nothing to do."""
        if not self._engine.has_work() and not self._wants_to_send():
            self._end.wait(max(self._next_report_s - time.monotonic(), 0.0))
        messages = self._end.receive()
        with self._compile_watch:
            self._handle(messages)
            if self._engine.has_work():
                self._step()
        if self._block_news is not None:
            self._block_news.publish()
        self._send_all()
        self._report_if_due()

    def _handle(self, messages: list[Any]) -> None:
        for message in messages:
            handle = self._handlers.get(type(message))
            if handle is not None:
                handle(message)
        if self._drain_wanted and not self._draining:
            self._drain(Drain(abort=False))

    def _step(self) -> None:
        for generation in self._engine.step():
            live = self._by_generation.get(generation)
            if live is not None:
                self._news[live] = None

    def _submit(self, message: Submit) -> None:
        if self._draining:
            self._outbox.append(Unavailable(message.id, "the engine takes no more requests: it drains"))
            return
        if message.id in self._by_id:
            raise MessageError(f"request {message.id} is submitted twice")
        num_samples, num_tokens = message.sampling.n, len(message.prompt.token_ids)
        refusal = self._admission.refusal(num_samples, num_tokens)
        if refusal is not None:
            self._outbox.append(Overloaded(message.id, refusal, self._admission.retry_after_s()))
            return
        try:
            self._llm.check_priority(message.priority)
            generation = self._queue(message)
        except RequestError as error:
            self._outbox.append(Refused(message.id, str(error)))
            return
        live = LiveRequest(message.id, generation)
        self._by_id[message.id] = self._by_generation[generation] = live
        self._admission.add(num_samples, num_tokens)

    def _queue(self, message: Submit) -> Generation:
        """Hand a prompt to the engine. Raises `RequestError` when it is wrong."""
        engine, pooling = self._engine, message.prompt.pooling
        given = _prompt_input(message.prompt, engine.uses_tenants)
        if pooling is not None:
            return engine.submit_pooled(engine.check_pooled(given, pooling), pooling, message.priority)
        return engine.submit(engine.check(given, message.sampling), message.sampling, message.priority)

    def _abort(self, message: Abort) -> None:
        live = self._by_id.get(message.id)
        if live is not None:
            self._engine.abort(live.generation)
            self._news[live] = None

    def _reset(self, message: ResetPrefixCache) -> None:
        self._engine.reset_prefix_cache()
        self._outbox.append(Done(message.id))

    def _drain(self, message: Drain) -> None:
        if not self._draining:
            logger.info("draining: %d requests are under way", len(self._by_id))
            self._draining = True
            self._outbox.append(Draining())
        if message.abort:
            for live in list(self._by_id.values()):
                self._abort(Abort(live.id))

    def _wants_to_send(self) -> bool:
        return bool(self._outbox or self._news)

    def _send_all(self) -> None:
        """Send what the client has room for. The rest is kept, and merged with what comes, until it reads."""
        while self._outbox or self._news:
            if not self._outbox:
                if not self._end.can_send():
                    break
                self._outbox.append(self._take_batch())
            try:
                if not self._end.send(self._outbox[0]):
                    break
            except MessageError as error:
                self._split(self._outbox.popleft(), error)
                continue
            self._outbox.popleft()
        if self._wants_to_send() and not self._engine.has_work():
            # Nothing else to do until the client reads; messages from it wake this up.
            self._end.wait(0.01)

    def _take_batch(self) -> Deltas:
        lives = list(self._news)[:_BATCH] if len(self._news) > _BATCH else list(self._news)
        batch = []
        for live in lives:
            del self._news[live]
            delta = live.take(self._engine)
            if delta.samples or delta.finished:
                batch.append((live.id, delta))
            if delta.finished:
                self._forget(live)
        return Deltas(batch)

    def _split(self, message: FromEngine, error: MessageError) -> None:
        """Send half of a message that is too large at a time; give up on a request whose share alone is."""
        if not isinstance(message, Deltas):
            raise error
        if len(message.batch) > 1:
            middle = len(message.batch) // 2
            self._outbox.extendleft([Deltas(message.batch[middle:]), Deltas(message.batch[:middle])])
            return
        request_id, _ = message.batch[0]
        live = self._by_id.get(request_id)
        if live is not None:
            self._engine.abort(live.generation)
            self._forget(live)
        self._outbox.appendleft(Refused(request_id, f"the answer is too large to send: {error}"))

    def _forget(self, live: LiveRequest) -> None:
        generation = live.generation
        del self._by_id[live.id], self._by_generation[generation]
        self._news.pop(live, None)
        self._admission.remove(generation.sampling.n, len(generation.prompt.token_ids))

    def _report_if_due(self) -> None:
        """Send the counts every `report_s`, and at once when there is nothing to do any more."""
        now, is_idle = time.monotonic(), not self._engine.has_work()
        if now < self._next_report_s and (not is_idle or self._was_idle):
            return
        self._was_idle = is_idle
        self._next_report_s = now + self._report_s
        self._end.send(Stats(self._stats(now)))

    def _stats(self, now: float) -> EngineStats:
        engine, counts = self._engine, self._engine.counts
        return EngineStats(
            time_s=now,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_usage=engine.kv_usage(),
            num_steps=counts.num_steps,
            last_step_s=counts.last_step_s,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_generated_tokens=counts.num_generated_tokens,
            num_cached_tokens=counts.num_cached_tokens,
            num_prefix_queries=counts.num_prefix_queries,
            num_preemptions=counts.num_preemptions,
            num_drafted_tokens=counts.num_drafted_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
        )


def _prompt_input(prompt: EnginePrompt, uses_tenants: bool) -> dict[str, object]:
    """Return a prompt in the form that the engine checks, with what was given only.

    Who asks is known to the server whether or not the engine charges anyone.
    """
    given: dict[str, object] = {"prompt_token_ids": prompt.token_ids}
    if prompt.cache_salt:
        given["cache_salt"] = prompt.cache_salt
    if prompt.tenant and uses_tenants:
        given["tenant"] = prompt.tenant
    if prompt.timeout_s is not None:
        given["timeout_s"] = prompt.timeout_s
    return given
