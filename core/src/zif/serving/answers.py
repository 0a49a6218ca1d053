"""Prompts and answers as they cross from process to process: what handlers send to an engine and what comes back.

Structs are encoded as arrays by msgspec; unknown types and missing fields are refused when they are decoded.
"""

from collections.abc import AsyncGenerator
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import msgspec

from zif.contract import SamplingParams
from zif.engine.pooling import PoolingAbilities, PoolingParams


class EnginePrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt, tokenized. `cache_salt` separates whose prefixes are reused; `tenant` is who is charged.

    With `pooling` its answer is a vector, `AnswerDelta.pooled`, and sampling options have no meaning.
    """

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    timeout_s: float | None = None
    pooling: PoolingParams | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate of a position. `rank` is 1 for the most likely token, None where it was not counted."""

    token_id: int
    logprob: float
    rank: int | None
    text: str | None


PositionLogprobs = list[TokenLogprob]
"""The candidates of one position; the chosen token comes first."""


class SampleDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one of the n samples of a prompt got since the last delta. `finish_reason` comes with its last.

    `finish_reason` and `stop_reason` are those of `zif.engine.outputs.CompletionOutput`.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


class AnswerDelta(msgspec.Struct, frozen=True, array_like=True):
    """What a prompt's samples got since the last delta. Each sample's deltas come in order.

    `prompt_logprobs` comes once, with the first delta after the prompt was computed; its first entry is None.
    `queue_s` is how long the prompt waited for its first step, as far as the sender says. `pooled` comes with the end
    of a prompt that is pooled, unless its sample has an error: float32, little endian.
    """

    samples: list[SampleDelta]
    finished: bool
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    queue_s: float | None = None
    pooled: bytes | None = None


class EngineState(StrEnum):
    """Where an engine process stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    RESTARTING = "restarting"
    FAILED = "failed"


class ModelInfo(msgspec.Struct, frozen=True):
    """What the HTTP side knows of the model that an engine serves. `folder` holds tokenizer and chat template."""

    name: str
    folder: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    platform: str
    default_sampling: SamplingParams
    pooling: PoolingAbilities = PoolingAbilities()


class EngineStats(msgspec.Struct, frozen=True):
    """An engine's counts at one moment. Counters only grow; `kv_usage` is 0 to 1; times are of the sender's clock.

    `num_restarts` counts the processes before this one; as the client gives them, counters include what those did.

    `num_prefix_queries` counts prompt tokens that were looked up among computed prefixes, of which `num_cached_tokens`
    were found.
    """

    time_s: float
    num_running: int
    num_waiting: int
    kv_usage: float
    num_steps: int
    last_step_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    num_prefix_queries: int
    num_preemptions: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_restarts: int = 0


class OverloadedError(Exception):
    """The queue is full. `retry_after_s` says when to come again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineUnavailableError(Exception):
    """No engine takes requests now: it starts, drains, was restarted while answering, or failed."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineClient(Protocol):
    """An engine as the HTTP side sees it. All methods run on one event loop."""

    @property
    def info(self) -> ModelInfo:
        """Return what is served. Raises `EngineUnavailableError` before the first start has ended."""
        ...

    @property
    def state(self) -> EngineState:
        """Return where the engine stands."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """Return the last counts that the engine sent; None before the first."""
        ...

    def problem(self) -> str | None:
        """Return why the engine is not ready to answer, None when it is: steps progress, or it is provably idle."""
        ...

    def check_room(self) -> None:
        """Raise `OverloadedError` while the queue has no room for even the smallest prompt."""
        ...

    def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        """Answer a prompt. Closing the generator aborts it in the engine; so does cancelling the task that reads it.

        Raises, with the first delta or later, `RequestError` (this request is wrong), `OverloadedError` (nothing was
        queued), `EngineUnavailableError` (the engine is gone; nothing more will come).
        """
        ...

    async def reset_prefix_cache(self) -> None:
        """Forget every computed prefix."""
        ...


E = TypeVar("E", bound=EngineClient)


class EngineAround(Generic[E]):
    """An engine around `engine`, to which all but prompts is passed on; a subclass says what becomes of these.

    A subclass is an `EngineClient` once it has `generate` and `check_room`.
    """

    def __init__(self, engine: E) -> None:
        self._engine = engine

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def state(self) -> EngineState:
        return self._engine.state

    @property
    def stats(self) -> EngineStats | None:
        return self._engine.stats

    def problem(self) -> str | None:
        return self._engine.problem()

    async def reset_prefix_cache(self) -> None:
        await self._engine.reset_prefix_cache()
