"""What a caller gets back. Names and fields follow vLLM where the meaning is the same."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability. `rank` is 1 for the most likely token, None where it was not counted."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id to log-probability at one position: the chosen token and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample. `stop_reason` is the stop string or stop token id that ended it, None at end of sequence.

    `finish_reason` is "stop", "length", "abort" (interrupted, or past its time limit, which `error` then says; what was
    generated is kept) or "error" (`error` says why), and None while it goes on. `text` is empty when `detokenize` is
    off.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Say whether the sample has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds on one monotonic clock; None for what did not happen.

    Of `num_drafted_tokens` guesses that were checked `num_accepted_tokens` were right, each of which saved a step. The
    samples gave their blocks to others `num_preemptions` times, and started over after a fault `num_recoveries` times.
    """

    arrival_s: float
    first_token_s: float | None
    finished_s: float | None
    num_preemptions: int
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_recoveries: int = 0

    @property
    def time_to_first_token_s(self) -> float | None:
        """Return the seconds from arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(slots=True)
class RequestOutput:
    """One prompt with its samples. `prompt_logprobs[0]` is None: nothing predicts the first token.

    `num_cached_tokens` counts the prompt tokens that were found computed; `cache_miss` says why no more were, in the
    words of `zif.contract.PrefixMiss`, and is None when all that can be reused were. `cached_tokens_by_tier` says where
    they were found: "device", "host", "disk", "remote".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    cache_miss: str | None = None
    cached_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of a text."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """What a score head says of a text: `logits` and `probs`, one of each label."""

    logits: list[float]
    probs: list[float]


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How much two texts have to do with each other."""

    score: float


@dataclass(frozen=True, slots=True)
class PooledOutput(Generic[T]):
    """One prompt that was pooled. `outputs` is None where `error` says why there is no result.

    `num_cached_tokens` counts the prompt tokens that were found computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: T | None
    num_cached_tokens: int = 0
    error: str | None = None
