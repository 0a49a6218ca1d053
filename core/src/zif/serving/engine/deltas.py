"""From what the engine gives out of an answer to what crosses the channel."""

from zif.engine.engine import Engine
from zif.engine.generation import Generation
from zif.engine.outputs import CompletionOutput
from zif.engine.outputs import PositionLogprobs as EnginePosition
from zif.serving.answers import AnswerDelta, PositionLogprobs, SampleDelta, TokenLogprob


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
        return AnswerDelta(
            samples,
            generation.finished,
            len(generation.prompt.token_ids),
            generation.num_cached_tokens,
            prompt_logprobs,
            queue_s,
            _vector(generation),
        )


def _vector(generation: Generation) -> bytes | None:
    """Return what a prompt that is pooled became, once it has."""
    if generation.pooled is None or not generation.finished or generation.pooling_error is not None:
        return None
    return generation.pooled.vector().astype("<f4", copy=False).tobytes()


def _sample(output: CompletionOutput) -> SampleDelta:
    logprobs = None if output.logprobs is None else [_position(entry) for entry in output.logprobs]
    return SampleDelta(
        output.index, output.text, output.token_ids, logprobs, output.finish_reason, output.stop_reason, output.error
    )


def _position(entry: EnginePosition) -> PositionLogprobs:
    return [TokenLogprob(token_id, one.logprob, one.rank, one.decoded_token) for token_id, one in entry.items()]
