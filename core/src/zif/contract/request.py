"""A request as scheduler and block manager share it: known tokens, computed tokens, blocks held.

There are no phases. `token_ids` are the known tokens (prompt, then output); `num_computed_tokens` of them have their
KV in blocks; scheduling lets the second number catch up with the first:

    token_ids   |<------ prompt ------>|<-- output -->|
    computed    |<------------------->|                    still to compute: num_tokens - num_computed_tokens
"""

import math
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Final

from zif.contract.hidden import HiddenRows
from zif.contract.sampling import SamplingParams


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended. The values are those of the OpenAI API where it has one.

    ABORT is an end from outside: the caller's wish, or the deadline, which `Request.error` then names.
    """

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


class PrefixMiss(StrEnum):
    """Why no longer prefix was found computed.

    CACHING_OFF, PROMPT_LOGPROBS and HIDDEN_STATES: nothing was looked up, because reuse is off or every prompt token's
    logits or hidden states are asked for. SHORT_PROMPT: less than a block and a token. NOT_SEEN: nobody has computed
    this before. EVICTED: it was computed and its memory reused. NO_CHECKPOINT: the tokens were found, a recurrent state
    to go on from was not.
    """

    CACHING_OFF = "caching_off"
    PROMPT_LOGPROBS = "prompt_logprobs"
    HIDDEN_STATES = "hidden_states"
    SHORT_PROMPT = "short_prompt"
    NOT_SEEN = "not_seen"
    EVICTED = "evicted"
    NO_CHECKPOINT = "no_checkpoint"


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What was found of a request's prefix at admission.

    `num_tokens` of at most `max_tokens` were found; `miss` says why no more, None when all were; `kind` names the layer
    group that ended the prefix. `by_tier` says how many of the found tokens came from which tier, "device" first.
    """

    num_tokens: int
    max_tokens: int
    miss: PrefixMiss | None = None
    kind: str = ""
    by_tier: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Retention:
    """How long the blocks of some tokens should be kept for reuse, once their request has ended.

    It covers the tokens from `start` to `end` (None: to the last). Of unowned blocks, those of the lowest `priority`
    (0 to 100) are reused first, among equals the least recently used. After `duration_s` since the request
    was last admitted the default applies again (None: never). A block that two ranges touch has the higher priority.
    """

    priority: int
    start: int = 0
    end: int | None = None
    duration_s: float | None = None


DEFAULT_RETENTION_PRIORITY: Final = 50
"""The priority of blocks that no `Retention` names."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. Owned by the scheduler, the last six fields by the block manager.

    `request_id` is the engine's own number, never taken from a caller. `seed` is resolved: the caller's, or one that
    the engine drew. `stop_ids` end the request when sampled (end of sequence, unless ignored, and the stop token ids).
    `max_total_tokens` is prompt plus output at most. `siblings` are the parallel samples of one prompt, this one
    included; they share the prompt's blocks. `num_cached_tokens` is what was found computed at first admission. Of
    `num_drafted_tokens` guesses that were computed `num_accepted_tokens` were right. `num_preemptions` counts how often
    the request gave its blocks to others, `num_recoveries` how often it started over after a fault.

    `num_planned_tokens` are the computed tokens and those that steps under way compute; `num_pending_tokens` tokens
    will be known when those steps end. `draft_token_ids` are guesses of the next tokens, made after the last step.
    `num_encoder_tokens` is the length of the input that cross-attention layers see. `retention` says which blocks to
    keep for longer or less long than others. A request with `hidden` wants the hidden states of its prompt: it samples
    nothing and ends with reason STOP when its tokens are computed.

    `tenant` is who the tokens are charged to under fair shares and whose quota cached blocks count against. Past
    `deadline_s`, on the scheduler's clock, the
    request ends with reason ABORT and says so in `error`. The scheduler sets `first_step`, the step that last
    started the request, `due_s`, after which no later request may
    pass this one, `order`, the place among running requests (smaller first), and `num_bypasses`, how many have passed.

    `distrusts_cache` is set when a step gave nonsense on blocks that the request had found: nothing is looked up for it
    any more.

    `block_ids` maps, per layer group, logical block to block id, 0 where a block was returned. `capacity` counts the
    token slots that every group holds; `next_commit` is the number of computed tokens at which `commit` has work;
    the prefix index has seen the first `num_indexed_tokens`. `digests` are the prefix hashes so far, by block size;
    `prefix` is what was found at first admission.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_total_tokens: int
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    arrival: int = 0
    cache_key: CacheKey = field(default_factory=CacheKey)
    siblings: "tuple[Request, ...]" = ()
    tenant: str = ""
    deadline_s: float | None = None
    retention: tuple[Retention, ...] = ()
    num_encoder_tokens: int = 0
    hidden: HiddenRows | None = None
    draft_token_ids: list[int] = field(default_factory=list)
    due_s: float = math.inf
    order: tuple[float, ...] = ()
    num_bypasses: int = 0
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_planned_tokens: int = 0
    num_pending_tokens: int = 0
    first_step: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_recoveries: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    distrusts_cache: bool = False
    block_ids: tuple[list[int], ...] = ()
    capacity: int = 0
    next_commit: int = 0
    num_indexed_tokens: int = 0
    prefix: PrefixReport | None = None
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
