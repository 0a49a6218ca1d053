"""A request as scheduler and block manager share it: known tokens, computed tokens, blocks held.

There are no phases. `token_ids` are the known tokens (prompt, then output); `num_computed_tokens` of them have their
KV in blocks; scheduling lets the second number catch up with the first:

    token_ids   |<------ prompt ------>|<-- output -->|
    computed    |<------------------->|                    still to compute: num_tokens - num_computed_tokens
"""

from dataclasses import dataclass, field
from enum import Enum

from zif.contract.sampling import SamplingParams


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended. The values are those of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What besides its tokens decides the content of a KV block.

    `salt` separates tenants; `adapter` names weights added to the model; `media` are content hashes of non-text input.
    """

    salt: str = ""
    adapter: str = ""
    media: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. Owned by the scheduler; `block_ids`, `capacity` and `digests` by the block manager.

    `request_id` is the engine's own number, never taken from a caller. `stop_ids` end the request when sampled (end of
    sequence, unless ignored, and the stop token ids). `max_total_tokens` is prompt plus output at most. `leader` is
    the request of the same prompt whose blocks this one may share (parallel samples). `capacity` counts the token
    slots that every layer group holds. `num_cached_tokens` is what the prefix index gave at admission.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_total_tokens: int
    stop_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    arrival: int = 0
    cache_key: CacheKey = CacheKey()
    leader: "Request | None" = None
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    block_ids: tuple[list[int], ...] = ()
    capacity: int = 0
    next_commit: int = 0
    digests: dict[int, list[bytes]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Count the known tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Count the tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Return the tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        """Say whether the request has ended."""
        return self.status is RequestStatus.FINISHED
