"""The control plane's two replaceable parts: scheduler and block manager.

Both deal in integers and never import an array library. Core ships one of each; a plugin replaces them through
`zif_scheduler` and `zif_block_manager`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from zif.contract.request import FinishReason, Request
from zif.contract.step import StepPlan, StepResult
from zif.contract.transfers import Transfers


@dataclass(frozen=True, slots=True)
class KVUsage:
    """A census of one layer group's blocks. `num_free + num_cached + num_owned` is all that the group holds.

    Cached blocks are unowned but still found by prefix; `num_lendable` more could be borrowed from the arena.
    """

    num_free: int
    num_cached: int
    num_owned: int
    num_lendable: int


class BlockManager(ABC):
    """Own the KV blocks: give each planned token a slot in every layer group, and find what is already computed."""

    @abstractmethod
    def begin(self, request: Request, source: Request | None = None) -> None:
        """Give a request without blocks a share of the longest computed prefix that every group can serve.

        The prefix is found in the prefix index, or in the blocks of `source`, a running request with the same prompt.
        At least one known token is left to compute. Where `serves_hidden`, a request that wants every hidden state
        (`HiddenRows.ALL`) gets no more than it has computed itself. Sets `block_ids`, `capacity`, `next_commit` and
        `num_computed_tokens`.
        """

    @property
    def serves_hidden(self) -> bool:
        """Say whether `begin` keeps its promise to requests that want every hidden state; others never come."""
        return False

    @abstractmethod
    def reserve(self, request: Request, num_tokens: int) -> bool:
        """Make slots for the first `num_tokens` tokens in every group.

        Appends to `block_ids` and raises `capacity`. False, and no request changed, when there are not enough blocks;
        cached blocks may have been dropped in the attempt.
        """

    def step_end(self, request: Request, num_tokens: int) -> int:
        """Return where a step that would compute up to `num_tokens` tokens should end: there, or earlier.

        Kinds of state that can be resumed only where a step ended get their checkpoints this way.
        """
        return num_tokens

    @property
    def drafts_are_atomic(self) -> bool:
        """Say whether a row with a refused guess has computed nothing, because a group's state would be spoiled."""
        return False

    def reserve_draft(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Make slots for the first `num_tokens` tokens, of which those beyond the known ones are guesses.

        Returns `Draft.state_blocks`: a block for each group whose state a refused guess would spoil, 0 for the others.
        None, and the request unchanged, when there are not enough blocks or drafts are not served at all, the default.
        A request has one draft at most; `settle_draft` or `release` ends it.
        """
        return None

    def settle_draft(self, request: Request, *, all_accepted: bool) -> None:  # noqa: B027 - nothing without drafts
        """Keep what the accepted tokens of the draft take, given `num_computed_tokens`, and return the other blocks."""

    def suspend(self, request: Request) -> None:
        """Take every block from a request that will go on later; what it computed may be kept in a lower tier.

        `begin` then finds it there. Whether keeping is cheaper than computing again is the manager's judgement.
        """
        self.release(request)

    def take_transfers(self) -> Transfers | None:
        """Return the copies that must precede the next step, and forget them; None when there are none."""
        return None

    def forget_lost(self, handles: Sequence[int]) -> list[Request]:
        """Hear that a store has lost copies; return the requests that hold blocks filled from them."""
        return []

    @abstractmethod
    def commit(self, request: Request) -> None:
        """Index the blocks that `num_computed_tokens` has filled and return blocks that no later token can see."""

    @abstractmethod
    def release(self, request: Request) -> None:
        """Take every block from `request`; indexed blocks stay findable until they are reused."""

    def quarantine(self, request: Request) -> None:
        """Let nobody find what `request` has computed or found: its numbers are not to be trusted. It keeps its blocks.

        Others that hold some of these blocks keep them too. The default forgets every computed prefix.
        """
        self.reset_prefix_cache()

    @abstractmethod
    def can_hold(self, request: Request, num_tokens: int) -> bool:
        """Say whether there are blocks now for `request` to reach `num_tokens` tokens. Does not mutate."""

    @abstractmethod
    def fits(self, num_tokens: int) -> bool:
        """Say whether one request of `num_tokens` tokens, alone, would ever fit."""

    @abstractmethod
    def usage(self) -> tuple[KVUsage, ...]:
        """Count the blocks of each group."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every computed prefix, in every tier; blocks in use and suspended requests are unaffected."""

    def free_cached_blocks(self) -> None:
        """Give back every block that no request holds; copies in lower tiers are unaffected."""
        self.reset_prefix_cache()

    @abstractmethod
    def check_integrity(self, live: list[Request]) -> None:
        """Rebuild reference counts and census from `live` requests and assert that they match."""


@dataclass(slots=True)
class TokenUpdate:
    """What one step changed for one request. `new_token_ids` may be empty when the request only ended."""

    request: Request
    new_token_ids: list[int]


class Scheduler(ABC):
    """Decide what each step computes, and apply what it gave."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request."""

    @abstractmethod
    def finish(self, request_id: int, reason: FinishReason) -> Request | None:
        """End a request from outside (abort, stop string). None when it is unknown or already over."""

    @abstractmethod
    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute or to release until a step under way is applied.

        Steps may be planned ahead, while earlier ones are under way. A plan may hold no requests but only tell the
        runner which ones to forget.
        """

    @abstractmethod
    def update(self, plan: StepPlan, result: StepResult) -> list[TokenUpdate]:
        """Apply the result of `plan`: append tokens, end requests, return blocks.

        Plans are applied in order, each once; again, it changes nothing. Raises `ContractError`, nothing changed, on
        the result of another step or of one that is not the oldest under way.
        """

    @property
    def serves_hidden(self) -> bool:
        """Say whether requests with `hidden` are planned without a sample and ended when their tokens are computed."""
        return False

    def abandon(self, plans: Sequence[StepPlan], error: str) -> list[TokenUpdate] | None:
        """Hear that the first of `plans` raised, and that these, all that were under way, will never give a result.

        Nothing writes any more. Requests go on from what is known of them; the one that makes steps raise ends with
        `error`, once it is found. Whether the transfers of `plans` were made is not known: their drops and demotions
        come first among those of the next plan, their saves and loads not again. Returns what ended; None when there is
        no going on, as always by default.
        """
        return None

    def holders(self) -> list[Request]:
        """Return the ended requests whose blocks are not returned yet, because steps under way may write to them."""
        return []

    @abstractmethod
    def has_requests(self) -> bool:
        """Say whether any request is waiting or running, or the runner must still be told of released ones."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Count the requests that hold no place in the running batch."""

    @property
    @abstractmethod
    def num_running(self) -> int:
        """Count the requests in the running batch."""
