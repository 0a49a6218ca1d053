"""Who may start: an estimate of the KV memory that running requests will still take, and a bound on being passed.

A request that starts because there is room *now* is preempted when those before it grow. So a request starts only if
there will be room at every moment to come, as far as can be told: each step every running request grows by a token,
and the shortest end first and give back what they hold.

    tokens still to come of a request = min(share * (allowed tokens - known tokens), HORIZON_TOKENS)

    tokens when the i-th longest ends = sum of known tokens of the i longest + i * still to come of the i-th

This is the look-ahead of the past-future scheduler (Gong et al., ASPLOS 2025), with one number instead of a
distribution: `share`, the part of their allowed output that requests use, is learned. Requests that end pull it to
what they used, a preemption raises it (as SGLang adapts its new-token ratio). When the estimate is too low, preemption
helps out; a request that would run alone is never held back, so nothing deadlocks. `scheduler.py` is the only caller.
"""

import bisect
import itertools
from dataclasses import dataclass, field
from typing import Final

from zif.contract import BlockManager, EngineConfig, FinishReason, Request, RequestStatus

HORIZON_TOKENS: Final = 1024
"""Growth further ahead than this is not reserved: an allowance of a whole context must not empty the batch."""
MAX_SCANNED: Final = 16
"""Waiting requests that one step looks at and does not start."""

_END_RATE = 1 / 16
_PREEMPTION_RATE = 1 / 32


@dataclass(slots=True)
class Look:
    """One look along the waiting requests: who could not start, who waits for a sibling's prompt."""

    passed: list[Request] = field(default_factory=list)
    unready: list[Request] = field(default_factory=list)
    cache_is_empty: bool = False

    def count_bypass(self) -> None:
        """Note that a request started before those that could not."""
        for request in self.passed:
            request.num_bypasses += 1


class Admission:
    """Judge waiting requests against the blocks that are left."""

    def __init__(self, config: EngineConfig, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._max_bypasses = config.max_bypasses
        self._share = config.expected_output_percent / 100
        self._futures: list[tuple[int, int]] | None = None
        self._held = 0
        self._total = 0
        self._refused: set[int] = set()
        self._settled = False

    @property
    def settled(self) -> bool:
        """Say whether every waiting request was refused and nothing has changed since."""
        return self._settled

    def end_look(self, look: Look) -> None:
        """Note that a look went as far as any may: to the last request, or to one that may not be passed."""
        self._settled = not look.unready and all(map(self.is_refused, look.passed))

    def unsettle(self) -> None:
        """Note that a request came."""
        self._settled = False

    def num_expected(self, request: Request) -> int:
        """Return how many tokens a request is expected to generate yet, as far ahead as estimated."""
        return min(int(self._share * (request.max_total_tokens - len(request.token_ids))), HORIZON_TOKENS)

    def begin_look(self) -> None:
        """Forget what was added up for the last look."""
        self._futures = None

    def has_room(self, request: Request, running: list[Request]) -> bool:
        """Say whether there is room for a request beside what the running ones are expected to take."""
        if self._futures is None:
            self._futures = sorted(map(self._future, running))
            self._held = sum(r.capacity for r in running)
            self._total = sum(known - minus_expected for minus_expected, known in self._futures)
        future = self._future(request)
        if self._blocks.can_hold(request, max(self._total - future[0] + future[1] - self._held, request.num_tokens)):
            # Even if all were largest at once: no need to look at each moment.
            return True
        with_it = self._futures.copy()
        bisect.insort(with_it, future)
        return self._blocks.can_hold(request, max(_peak_tokens(with_it) - self._held, request.num_tokens))

    def start(self, request: Request) -> None:
        """Add a request that now runs to what is expected."""
        if self._futures is not None:
            future = self._future(request)
            bisect.insort(self._futures, future)
            self._held += request.capacity
            self._total += future[1] - future[0]

    def _future(self, request: Request) -> tuple[int, int]:
        return (-self.num_expected(request), len(request.token_ids))

    def refuse(self, request: Request) -> None:
        """Remember that there was no room; there will be none until something is given back."""
        self._refused.add(request.request_id)

    def is_refused(self, request: Request) -> bool:
        """Say whether there was no room for the request and nothing has been given back since."""
        return request.request_id in self._refused

    def may_look_on(self, look: Look, now_s: float) -> bool:
        """Say whether requests after those that could not start may be tried: none of them was passed too often."""
        return len(look.passed) < MAX_SCANNED and all(
            request.num_bypasses < self._max_bypasses and now_s < request.due_s for request in look.passed
        )

    def end(self, request: Request) -> None:
        """Learn from a request that ended."""
        allowed = 0 if request.hidden else request.max_total_tokens - request.num_prompt_tokens
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and allowed > 0:
            self._share += (request.num_output_tokens / allowed - self._share) * _END_RATE
        self.give_back()

    def preempt(self) -> None:
        """Learn that too many were admitted."""
        self._share += (1 - self._share) * _PREEMPTION_RATE
        self.give_back()

    def give_back(self) -> None:
        """Note that blocks were returned."""
        self._futures = None
        self._refused.clear()
        self._settled = False


def _peak_tokens(futures: list[tuple[int, int]]) -> int:
    """Return the most tokens held at once; `futures` are (-tokens to come, known tokens), the longest first."""
    num_known = itertools.accumulate(known for _, known in futures)
    return max(
        known - count * future[0] for count, (known, future) in enumerate(zip(num_known, futures, strict=True), start=1)
    )


def sample_source(request: Request) -> Request | None:
    """Return a sibling that holds the whole prompt computed, and soundly."""
    return next((s for s in request.siblings if _holds_prompt(s)), None)


def _holds_prompt(request: Request) -> bool:
    is_sound = request.error is None and not request.distrusts_cache
    return bool(request.block_ids) and request.num_computed_tokens >= request.num_prompt_tokens and is_sound


def awaits_sibling(request: Request) -> bool:
    """Say whether a sibling is computing the prompt now."""
    return any(s.status is RequestStatus.RUNNING for s in request.siblings)


def no_room_error(request: Request) -> str:
    """Say that a request found no room even alone."""
    return (
        f"no KV blocks for {request.num_tokens} tokens, although no other request holds any: give the engine more "
        "kv_bytes, or the request fewer tokens"
    )
