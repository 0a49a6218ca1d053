"""The answers that a client waits for: one stream a request, bounded by the answer itself when nobody reads it."""

import asyncio
from dataclasses import dataclass, field

from zif.serving.answers import AnswerDelta, PositionLogprobs, SampleDelta


@dataclass(slots=True)
class _SampleBacklog:
    """What one sample got while nobody read. `last` is the newest delta, whose end counts."""

    last: SampleDelta
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None

    def add(self, delta: SampleDelta) -> None:
        self.last = delta
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs += delta.logprobs

    def merged(self) -> SampleDelta:
        last = self.last
        return SampleDelta(
            last.index,
            "".join(self.texts),
            self.token_ids,
            self.logprobs,
            last.finish_reason,
            last.stop_reason,
            last.error,
        )


def merge(deltas: list[AnswerDelta]) -> AnswerDelta:
    """Return one delta that says what several of one answer say, in their order."""
    if len(deltas) == 1:
        return deltas[0]
    samples: dict[int, _SampleBacklog] = {}
    for delta in deltas:
        for sample in delta.samples:
            samples.setdefault(sample.index, _SampleBacklog(sample)).add(sample)
    newest = deltas[-1]
    return AnswerDelta(
        [backlog.merged() for backlog in samples.values()],
        newest.finished,
        newest.num_prompt_tokens,
        newest.num_cached_tokens,
        next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        next((delta.queue_s for delta in deltas if delta.queue_s is not None), None),
        newest.pooled,
    )


_MERGED_EVERY = 64
"""Unread deltas that are kept apart before they become one."""


class AnswerStream:
    """One request of a client. `num_samples` and `num_tokens` are what admission counts for it.

    One task reads. What it does not read in time is merged, so that an answer takes the memory of its tokens at most.
    """

    __slots__ = ("_abandoned", "_deltas", "_error", "_limit", "_waiter", "ended", "id", "num_samples", "num_tokens")

    def __init__(self, request_id: int, num_samples: int, num_tokens: int) -> None:
        self.id = request_id
        self.num_samples = num_samples
        self.num_tokens = num_tokens
        self.ended = False
        self._abandoned = False
        self._deltas: list[AnswerDelta] = []
        self._limit = _MERGED_EVERY
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: AnswerDelta) -> None:
        """Take what the engine sent."""
        if self._abandoned:
            return
        self._deltas.append(delta)
        if len(self._deltas) >= self._limit:
            self._deltas = [merge(self._deltas)]
            # Merging copies what was merged before, so it must come at growing distances to stay linear.
            self._limit = max(_MERGED_EVERY, sum(len(sample.token_ids) for sample in self._deltas[0].samples))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what was received."""
        self._error = error
        self._wake()

    def abandon(self) -> None:
        """Keep nothing from now on: nobody will read."""
        self._abandoned = True
        self._deltas = []

    async def next(self) -> AnswerDelta:
        """Wait for what is new and return it as one delta. Raises the error that ended the stream."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        deltas, self._deltas = self._deltas, []
        self._limit = _MERGED_EVERY
        return merge(deltas)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
