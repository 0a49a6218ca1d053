"""From what the engine gives out of an answer to what crosses the channel."""

import logging

import msgspec

from zif.contract import FinishReason
from zif.engine.engine import Engine
from zif.engine.generation import Generation
from zif.engine.outputs import CompletionOutput
from zif.engine.outputs import PositionLogprobs as EnginePosition
from zif.serving.answers import AnswerDelta, PositionLogprobs, SampleDelta, TokenLogprob

logger = logging.getLogger(__name__)

_NOT_POOLED = "what its hidden states become could not be computed; the log of the engine has the cause"


class LiveRequest:
    """A request in the engine: the client's id for it, and what is sent once and was not yet."""

    __slots__ = ("generation", "id", "owes_prompt_logprobs", "owes_queue_s")

    def __init__(self, request_id: int, generation: Generation) -> None:
        self.id = request_id
        self.generation = generation
        self.owes_queue_s = True
        self.owes_prompt_logprobs = generation.prompt_logprobs is not None

    def take(self, engine: Engine) -> AnswerDelta:
        """Return what the samples got since the last call."""
        generation = self.generation
        samples = [_sample(output) for output in engine.take(generation)]
        prompt_logprobs = None
        # A sample has something only when the whole prompt was computed, or never will be.
        if self.owes_prompt_logprobs and samples and generation.prompt_logprobs is not None:
            self.owes_prompt_logprobs = False
            if generation.first_token_s is not None:
                prompt_logprobs = [None if entry is None else _position(entry) for entry in generation.prompt_logprobs]
        queue_s = None
        if self.owes_queue_s and generation.started_s is not None:
            self.owes_queue_s = False
            queue_s = generation.started_s - generation.arrival_s
        pooled, error = _pooled(generation)
        if error is not None:
            samples = [msgspec.structs.replace(sample, finish_reason="error", error=error) for sample in samples]
        return AnswerDelta(
            samples,
            generation.finished,
            len(generation.prompt.token_ids),
            generation.num_cached_tokens,
            prompt_logprobs,
            queue_s,
            pooled,
        )


def _pooled(generation: Generation) -> tuple[bytes | None, str | None]:
    """Return what a prompt that is pooled became, once it has, or why it became nothing although it was computed."""
    if generation.pooled is None or generation.samples[0].request.finish_reason is not FinishReason.STOP:
        return None, None
    error = generation.pooling_error
    if error is not None:
        return None, error
    try:
        return generation.pooled.vector().astype("<f4", copy=False).tobytes(), None
    except Exception:  # a process border: what one checkpoint or platform makes of a prompt ends no other's answer
        logger.exception("a prompt of %d tokens could not be pooled", len(generation.prompt.token_ids))
        return None, _NOT_POOLED


def _sample(output: CompletionOutput) -> SampleDelta:
    logprobs = None if output.logprobs is None else [_position(entry) for entry in output.logprobs]
    return SampleDelta(
        output.index, output.text, output.token_ids, logprobs, output.finish_reason, output.stop_reason, output.error
    )


def _position(entry: EnginePosition) -> PositionLogprobs:
    return [TokenLogprob(token_id, one.logprob, one.rank, one.decoded_token) for token_id, one in entry.items()]
