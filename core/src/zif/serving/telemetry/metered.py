"""An engine whose answers are timed and counted: an `EngineClient` around another one.

Every prompt of every API passes here, so no handler counts anything. A token costs two comparisons and one bucket.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.serving.answers import (
    AnswerDelta,
    EngineAround,
    EngineClient,
    EnginePrompt,
    EngineUnavailableError,
    OverloadedError,
)
from zif.serving.telemetry.metrics import ServerMetrics

ABORTED = "abort"
FAILED = "error"


class MeteredEngine(EngineAround[EngineClient]):
    """Pass everything on to `engine`, and tell `metrics` of every prompt. `clock` gives seconds, from any origin."""

    def __init__(
        self, engine: EngineClient, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(engine)
        self._metrics = metrics
        self._clock = clock

    def check_room(self) -> None:
        try:
            self._engine.check_room()
        except OverloadedError:
            # Whoever asks has a request in hand, and turns it away.
            self._metrics.rejections.add("queue_full")
            raise

    async def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        watch = AnswerWatch(self._metrics, self._clock(), len(prompt.token_ids))
        if prompt.pooling is None:
            watch.asked(sampling)
        try:
            async with aclosing(self._engine.generate(prompt, sampling, priority)) as deltas:
                async for delta in deltas:
                    watch.add(delta, self._clock())
                    yield delta
        except (GeneratorExit, asyncio.CancelledError):
            watch.left()
            raise
        except OverloadedError:
            watch.rejected("queue_full")
            raise
        except EngineUnavailableError:
            watch.rejected("engine_unavailable")
            raise
        except RequestError:
            watch.rejected("invalid")
            raise
        finally:
            watch.end(self._clock())


class AnswerWatch:
    """Follow the answer to one prompt. Times are of the caller's clock, in seconds."""

    __slots__ = (
        "_arrival_s", "_ended", "_first_s", "_last_s", "_metrics", "_num_prompt", "_num_tokens",
        "_queue_s", "_reason", "_sample_ends",
    )  # fmt: skip

    def __init__(self, metrics: ServerMetrics, arrival_s: float, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._first_s: float | None = None
        self._last_s = arrival_s
        self._queue_s: float | None = None
        self._num_prompt = num_prompt_tokens
        self._num_tokens = 0
        self._reason = FAILED
        self._ended = False
        self._sample_ends: dict[int, float] = {}

    def asked(self, sampling: SamplingParams) -> None:
        """Count what the request asks for."""
        self._metrics.params_n.add(sampling.n)
        if sampling.max_tokens is not None:
            self._metrics.params_max_tokens.add(sampling.max_tokens)

    def add(self, delta: AnswerDelta, now_s: float) -> None:
        """Count what came. Each sample's tokens are timed against its own last ones."""
        if self._queue_s is None and delta.queue_s is not None:
            self._queue_s = delta.queue_s
        for sample in delta.samples:
            if num_tokens := len(sample.token_ids):
                self._add_tokens(sample.index, num_tokens, now_s)
            if sample.finish_reason is not None:
                self._reason = sample.finish_reason
        if delta.finished:
            self.end(now_s)

    def rejected(self, reason: str) -> None:
        """Count a prompt that was not taken. Nothing else is counted of it, unless it had begun."""
        if self._first_s is None:
            self._ended = True
            self._metrics.rejections.add(reason)

    def left(self) -> None:
        """Note that nobody waits for the answer any more."""
        self._reason = ABORTED

    def end(self, now_s: float) -> None:
        """Count the whole prompt, once: with the last delta, or when nobody waits for it any more."""
        if self._ended:
            return
        self._ended = True
        metrics = self._metrics
        metrics.successes.add(self._reason)
        metrics.prompt_tokens.add(self._num_prompt)
        metrics.generation_tokens.add(self._num_tokens)
        metrics.e2e_s.add(now_s - self._arrival_s)
        if self._queue_s is not None:
            metrics.queue_s.add(self._queue_s)
        if self._first_s is not None:
            self._end_timed(self._first_s)

    def _end_timed(self, first_s: float) -> None:
        metrics, decode_s = self._metrics, self._last_s - first_s
        metrics.decode_s.add(decode_s)
        num_intervals = self._num_tokens - len(self._sample_ends)
        if num_intervals > 0:
            metrics.per_token_s.add(decode_s * len(self._sample_ends) / num_intervals)
        if self._queue_s is not None:
            prefill_s = max(0.0, first_s - self._arrival_s - self._queue_s)
            metrics.prefill_s.add(prefill_s)
            metrics.inference_s.add(prefill_s + decode_s)

    def _add_tokens(self, sample: int, num_tokens: int, now_s: float) -> None:
        ends = self._sample_ends
        before_s = ends.get(sample)
        if before_s is not None:
            self._metrics.inter_token_s.add((now_s - before_s) / num_tokens, num_tokens)
        elif self._first_s is None:
            self._first_s = now_s
            self._metrics.first_token_s.add(now_s - self._arrival_s)
        ends[sample] = self._last_s = now_s
        self._num_tokens += num_tokens
