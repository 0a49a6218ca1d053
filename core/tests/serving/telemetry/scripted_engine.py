"""An engine that is a script: what it says of itself can be set, what it answers is given."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from zif.contract import SamplingParams
from zif.serving.answers import (
    AnswerDelta,
    EnginePrompt,
    EngineState,
    EngineStats,
    EngineUnavailableError,
    ModelInfo,
    OverloadedError,
    SampleDelta,
)

MODEL = ModelInfo("tiny", "/models/tiny", 512, 256, [2], 100, 16, 8, "null", SamplingParams())
ZERO = EngineStats(0.0, 0, 0, 0.0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)


def stats(**counts: float) -> EngineStats:
    return msgspec.structs.replace(ZERO, **counts)


def delta(*tokens: int, index: int = 0, reason: str | None = None, queue_s: float | None = None) -> AnswerDelta:
    sample = SampleDelta(index, "x" * len(tokens), list(tokens), finish_reason=reason)
    return AnswerDelta([sample], reason is not None, 7, 3, queue_s=queue_s)


@dataclass
class ScriptedEngine:
    """`script` is what every prompt is answered with: deltas, or an error to raise. `closed` counts closed answers."""

    script: Sequence[AnswerDelta | Exception] = ()
    known: ModelInfo | None = MODEL
    state: EngineState = EngineState.READY
    stats: EngineStats | None = None
    trouble: str | None = None
    closed: int = 0
    resets: int = 0
    given: list[EnginePrompt] = field(default_factory=list)

    @property
    def info(self) -> ModelInfo:
        if self.known is None:
            raise EngineUnavailableError("the engine is starting")
        return self.known

    def problem(self) -> str | None:
        return self.trouble if self.state is EngineState.READY else self.state.value

    def check_room(self) -> None:
        if self.script and isinstance(self.script[0], OverloadedError):
            raise self.script[0]

    async def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        self.given.append(prompt)
        try:
            for entry in self.script:
                if isinstance(entry, Exception):
                    raise entry
                yield entry
        finally:
            self.closed += 1

    async def reset_prefix_cache(self) -> None:
        self.resets += 1
