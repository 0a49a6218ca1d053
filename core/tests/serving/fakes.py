"""An engine that is a script: tokens, delays and errors are what the test says, and what was asked is recorded.

    engine = FakeEngine()                                     # answers every prompt with words until max_tokens
    engine = FakeEngine(Script(pieces=["Hel", "lo"], finish_reason="stop"))
    engine = FakeEngine(Script(error=OverloadedError("full", 2.0)))
    engine = FakeEngine(lambda prompt, sampling: Script(...))   # by request

Nothing here sleeps. A script with `gates` waits before its k-th delta until the test sets the k-th event.
"""

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zif.contract import SamplingParams
from zif.serving.answers import (
    AnswerDelta,
    EnginePrompt,
    EngineState,
    EngineStats,
    EngineUnavailableError,
    ModelInfo,
    OverloadedError,
    PositionLogprobs,
    SampleDelta,
    TokenLogprob,
)

CHECKPOINT = Path(__file__).resolve().parents[3] / "examples" / "embedded_model" / "checkpoint"
WORDS = tuple(f" {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight"))
FIRST_TOKEN_ID = 100
MAX_PIECES = 4096
"""An answer ends here whatever `max_tokens` says, as an engine's ends at the model's length."""

MODEL_INFO = ModelInfo(
    name="embedded",
    folder=str(CHECKPOINT),
    max_model_len=1024,
    vocab_size=3072,
    eos_token_ids=[0],
    num_kv_blocks=64,
    block_size=16,
    max_num_seqs=256,
    platform="null",
    default_sampling=SamplingParams(max_tokens=None),
)


def make_stats(**changes) -> EngineStats:
    """Return the counts of an idle engine, with changes."""
    zeros = dict.fromkeys(EngineStats.__struct_fields__, 0)
    return EngineStats(**{**zeros, "time_s": 1.0, "kv_usage": 0.0, "last_step_s": 0.0, **changes})


@dataclass
class Script:
    """What one prompt is answered with: one token and one delta for each piece of text, alike for all n samples.

    `pieces` None gives words in turn, as many as `max_tokens` (default 16). `error` is raised before delta number
    `error_at`. Gate k is awaited before delta k; with fewer gates than deltas the rest come at once. A prompt that is
    pooled becomes `vector`.
    """

    pieces: Sequence[str] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: Sequence[int] | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None
    error_at: int = 0
    vector: Sequence[float] = (3.0, 4.0)
    gates: Sequence[asyncio.Event] = ()


@dataclass
class Submission:
    """One call of `generate`: what came, and how it ended."""

    prompt: EnginePrompt
    sampling: SamplingParams
    priority: int
    num_deltas: int = 0
    finished: bool = False
    aborted: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class FakeEngine:
    """An `EngineClient` whose answers are scripted. Attributes may be changed while it serves."""

    def __init__(
        self, script: Script | Callable[[EnginePrompt, SamplingParams], Script] | None = None,
        info: ModelInfo = MODEL_INFO,
    ) -> None:  # fmt: skip
        self.script = Script() if script is None else script
        self.model_info: ModelInfo | None = info
        self.state = EngineState.READY
        self.stats: EngineStats | None = make_stats()
        self.problem_text: str | None = None
        self.full: str | None = None
        self.submitted: list[Submission] = []
        self.num_resets = 0

    @property
    def info(self) -> ModelInfo:
        if self.model_info is None:
            raise EngineUnavailableError("the engine is starting", 1.0)
        return self.model_info

    @property
    def aborted(self) -> list[Submission]:
        """Return what was left before its end."""
        return [submission for submission in self.submitted if submission.aborted]

    def problem(self) -> str | None:
        return self.problem_text

    def check_room(self) -> None:
        if self.full is not None:
            raise OverloadedError(self.full, 1.5)

    async def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        submission = Submission(prompt, sampling, priority)
        self.submitted.append(submission)
        script = self.script(prompt, sampling) if callable(self.script) else self.script
        try:
            deltas = _deltas(script, prompt, sampling)
            for index in range(len(deltas) + 1):
                if index < len(script.gates):
                    await script.gates[index].wait()
                if script.error is not None and index == min(script.error_at, len(deltas)):
                    submission.finished = True
                    raise script.error
                if index == len(deltas):
                    break
                submission.num_deltas += 1
                submission.finished = deltas[index].finished
                yield deltas[index]
        finally:
            submission.aborted = not submission.finished
            submission.ended.set()


def _deltas(script: Script, prompt: EnginePrompt, sampling: SamplingParams) -> list[AnswerDelta]:
    if prompt.pooling is not None:
        vector = struct.pack(f"<{len(script.vector)}f", *script.vector)
        ended = SampleDelta(0, "", [], None, script.finish_reason or "stop")
        return [AnswerDelta([ended], True, len(prompt.token_ids), script.num_cached_tokens, pooled=vector)]
    limit = 16 if sampling.max_tokens is None else min(sampling.max_tokens, MAX_PIECES)
    pieces = [WORDS[k % len(WORDS)] for k in range(limit)] if script.pieces is None else list(script.pieces)[:limit]
    ids = script.token_ids or [FIRST_TOKEN_ID + k for k in range(len(pieces))]
    cut = script.pieces is not None and len(script.pieces) > limit
    reason = "length" if cut or script.pieces is None else "stop"
    reason = reason if script.finish_reason is None or cut else script.finish_reason
    if not pieces:
        nothing = [SampleDelta(n, "", [], None, reason, script.stop_reason) for n in range(sampling.n)]
        return [AnswerDelta(nothing, True, len(prompt.token_ids), script.num_cached_tokens)]
    deltas = []
    for k, piece in enumerate(pieces):
        last = k == len(pieces) - 1
        logprobs = None if sampling.logprobs is None else [_position(ids[k], piece, sampling.logprobs)]
        samples = [
            SampleDelta(n, piece, [ids[k]], logprobs, reason if last else None, script.stop_reason if last else None)
            for n in range(sampling.n)
        ]
        prompt_logprobs = _prompt_logprobs(prompt, sampling) if k == 0 else None
        deltas.append(AnswerDelta(samples, last, len(prompt.token_ids), script.num_cached_tokens, prompt_logprobs))
    return deltas


def _position(token_id: int, text: str, num_candidates: int) -> PositionLogprobs:
    """The chosen token is the most likely one; the others follow, each half as likely."""
    others = [TokenLogprob(token_id + k, -0.5 - k, k + 1, f"<{token_id + k}>") for k in range(1, num_candidates)]
    return [TokenLogprob(token_id, -0.5, 1, text), *others]


def _prompt_logprobs(prompt: EnginePrompt, sampling: SamplingParams) -> list[PositionLogprobs | None] | None:
    if sampling.prompt_logprobs is None:
        return None
    known = [_position(token_id, f"<{token_id}>", sampling.prompt_logprobs) for token_id in prompt.token_ids[1:]]
    return [None, *known]
