"""The values that cross between the engine and a model runner, once per step.

Columns, not rows: entry i of every list belongs to the i-th scheduled request. Lists of Python integers, so that a
step needs no array library and crosses a process border as it is.
"""

from dataclasses import dataclass, field
from typing import Protocol

from zif.contract.hidden import HiddenRows
from zif.contract.sampling import SamplingParams
from zif.contract.transfers import Transfers

NO_TOKEN_LEFT = "no token is left to sample"
"""How a fault begins that a request's own options caused: the request is wrong, the model and its device are well."""


@dataclass(frozen=True, slots=True)
class RequestStart:
    """A request that the runner does not hold yet: new, or resumed after preemption.

    `token_ids` are all known tokens, the first `num_prompt_tokens` of them the prompt. `block_ids` is the full block
    table, one list per layer group, indexed by logical block; entries behind a window are the null block 0.
    `seed` is never None here: the engine has drawn one if the caller gave none. `media` name the non-text input and
    `num_encoder_tokens` is its length for cross-attention; the runner knows the input by its name. A request with
    `hidden` wants hidden states in place of a token, and never samples.
    """

    request_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: tuple[list[int], ...]
    sampling: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    media: tuple[str, ...] = ()
    num_encoder_tokens: int = 0
    hidden: HiddenRows | None = None


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Blocks of a request that the runner holds: `block_ids` go to logical blocks `start`, `start + 1`, ...

    Whatever the runner knew of blocks from `start` on is void: refused drafts have given theirs back.
    """

    request_id: int
    group: int
    start: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens that a row computes after its known ones, to be accepted or refused by the same step.

    `state_blocks` has an entry per layer group. Groups that keep a state per request write the state after the row
    into their entry instead of the row's block table; other groups have 0 there and write to the block table.
    """

    token_ids: list[int]
    state_blocks: tuple[int, ...]


@dataclass(slots=True)
class StepPlan:
    """What one step computes.

    Request i computes its tokens `num_computed[i]` to `num_computed[i] + num_tokens[i] - 1`; when `samples[i]`, the
    logits of its last token choose the next one. The runner applies `released`, then `started`, then `block_updates`,
    then `transfers`, then computes. A released request id never comes back unless it is started again.

    A plan may be made while earlier steps are under way: a row may then begin with a token that an earlier step will
    only have sampled when this one is computed. Runners keep the tokens that they sample.

    A row of a request in `drafts` computes its known tokens, then the draft: `num_tokens[i]` counts both. The runner
    samples at the last known token and at each draft token, and accepts draft token j while it equals the token
    sampled before it. `sampled` has the accepted ones and the token after them. If all were accepted, a state group's
    `Draft.state_blocks` entry becomes the block of the row's last token; if not, the state from before the row stays
    and the next row begins again at `num_computed[i]`.
    """

    step: int
    request_ids: list[int] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    started: list[RequestStart] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    total_tokens: int = 0
    drafts: dict[int, Draft] = field(default_factory=dict)
    transfers: Transfers | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position.

    `token_ids[0]` is the token that was sampled (or stands in the prompt), with `rank` 1 for the most likely; the
    others are the most likely tokens in falling order.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(slots=True)
class StepResult:
    """What one step gave.

    `sampled[i]` holds the new tokens of the i-th request of the plan: one if it samples, up to one more than its draft
    has if it has one, else none. The
    dictionaries are keyed by request id and hold only requests that asked. `prompt_logprobs` covers the prompt tokens
    after the first that this step computed the predecessors of, in order. `faults` says why one request failed; the
    others are unaffected and a faulty request's `sampled` entry is ignored; where its own options are the reason the
    text begins with `NO_TOKEN_LEFT`. `unsound` are those of `faults` whose cause
    is what the model computed, which is not finite: nobody may use it again. `lost` are the handles of `BlockLoad`s
    whose content was gone: what the requests that asked for them computed in this step is void. `hidden` are the rows
    that requests with `RequestStart.hidden` asked for, by request id: the final hidden state, after the last norm, as
    float32, little endian, row after row; of HiddenRows.LAST one row in the step that computes the last known token, of
    ALL a row for each token of the step.
    """

    step: int
    sampled: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    hidden: dict[int, bytes] = field(default_factory=dict)
    unsound: set[int] = field(default_factory=set)


class StepFuture(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it gave; raise what the device raised."""
        ...


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """A `StepFuture` of a runner that computes before it returns."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value
