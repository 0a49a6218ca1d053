"""Core's scheduler: one rule under a token budget.

A step hands out tokens to requests so that computed tokens catch up with known ones. Prefill, chunked prefill, decode,
guessed tokens and recomputation after preemption are all this one rule.

Steps may be planned while earlier ones are under way. A request then counts the tokens that are planned
(`num_planned_tokens`) beside those that are computed, and the tokens that will be sampled (`num_pending_tokens`) beside
those that are known; results come late, in order, and those of a request that has since ended or started over are void.

Elsewhere: filling a step (`planner.py`), what a change of state entails (`lifecycle.py`), order (`policies.py`,
`queue.py`), what fits (`admission.py`, `limits.py`), writing a plan (`rows.py`).
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from zif.contract import (
    BlockManager,
    EngineConfig,
    FinishReason,
    Request,
    RequestStatus,
    Scheduler,
    SchedulerConstraints,
    StepPlan,
    StepResult,
    TokenUpdate,
    Transfers,
)
from zif.errors import ContractError
from zif.scheduling.lifecycle import Lifecycle
from zif.scheduling.limits import step_limits
from zif.scheduling.planner import StepPlanner


class TokenBudgetScheduler(Scheduler):
    """Schedule by token budget over a block manager. `clock` gives seconds that never fall; deadlines refer to it."""

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        constraints: SchedulerConstraints = SchedulerConstraints(),  # noqa: B008 - frozen value
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._blocks = block_manager
        self._requests = Lifecycle(config, block_manager, clock)
        self._planner = StepPlanner(step_limits(config, constraints), self._requests, block_manager)
        self._step = 0
        self._owed: Transfers | None = None

    def add(self, request: Request) -> None:
        self._requests.add(request)

    def finish(self, request_id: int, reason: FinishReason) -> Request | None:
        request = self._requests.requests.get(request_id)
        if request is not None:
            self._requests.end(request, reason)
            self._requests.drop_ended()
        return request

    def schedule(self) -> StepPlan | None:
        requests = self._requests
        requests.end_overdue()
        requests.trials.settle(requests.requests)
        if self._planner.stalled:
            return None
        plan = StepPlan(step=self._step)
        self._planner.fill(plan)
        if not plan.request_ids and not requests.released and not (requests.ended_early and not requests.in_flight):
            return None
        plan.released, requests.released = requests.released, []
        plan.transfers = self._take_transfers()
        requests.in_flight.append(self._step)
        self._step += 1
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenUpdate]:
        if not self._is_due(plan, result):
            return []
        if result.lost:
            self._start_over(result)
        requests = self._requests
        updates, requests.ended_early = requests.ended_early, []
        num_ended = requests.num_ended
        known, step, drafts, faults = requests.requests, plan.step, plan.drafts, result.faults
        for request_id, num_tokens, sampled in zip(plan.request_ids, plan.num_tokens, result.sampled, strict=True):
            request = known.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING or request.first_step > step:
                continue
            if faults and request_id in faults:
                self._fail(request, plan, result)
                updates.append(TokenUpdate(request, []))
            elif drafts and request_id in drafts:
                updates.append(TokenUpdate(request, self._accept(request, num_tokens, sampled)))
            else:
                request.num_computed_tokens += num_tokens
                if request.num_computed_tokens >= request.next_commit:
                    self._commit(request)
                if sampled or (request.hidden and request.num_computed_tokens == request.num_tokens):
                    updates.append(TokenUpdate(request, self._append_tokens(request, sampled)))
        if requests.num_ended != num_ended:
            requests.drop_ended()
        requests.step_applied(step)
        requests.trials.note_step()
        return updates

    @property
    def serves_hidden(self) -> bool:
        return True

    def abandon(self, plans: Sequence[StepPlan], error: str) -> list[TokenUpdate] | None:
        requests, failed = self._requests, plans[0]
        rows = zip(failed.request_ids, failed.num_computed, failed.num_tokens, strict=True)
        ends = {number: computed + num_tokens for number, computed, num_tokens in rows if number in requests.requests}
        verdict = requests.trials.blame(ends, alone=len(failed.request_ids) == 1)
        if verdict.hopeless or not failed.request_ids:
            return None
        requests.forget_steps()
        for request in [*requests.running]:
            requests.start_over(request)
        # How far the runner came with a plan is unknown, and telling it twice is harmless.
        requests.released = [*chain.from_iterable(plan.released for plan in plans), *requests.released]
        self._owed = _room_made(plans)
        requests.loner = None
        requests.admission.unsettle()
        updates, requests.ended_early = requests.ended_early, []
        if verdict.guilty is not None:
            request = requests.requests[verdict.guilty]
            request.error = error
            requests.end(request, FinishReason.ERROR)
            updates.append(TokenUpdate(request, []))
        return updates

    def holders(self) -> list[Request]:
        return self._requests.holders()

    def has_requests(self) -> bool:
        requests = self._requests
        return bool(requests.requests or requests.released or requests.ended_early or requests.in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._requests.waiting)

    @property
    def num_running(self) -> int:
        return len(self._requests.running)

    @property
    def num_in_flight(self) -> int:
        """Count the steps under way."""
        return len(self._requests.in_flight)

    def live_requests(self) -> list[Request]:
        """Return every request that has not ended."""
        return list(self._requests.requests.values())

    def forget_steps(self) -> None:
        """Hear that no step under way will ever give a result: nothing writes any more, their rows are void."""
        self._requests.forget_steps()

    def _take_transfers(self) -> Transfers | None:
        """Return the copies that precede the next plan; what abandoned plans owe the store comes first."""
        owed, self._owed = self._owed, None
        transfers = self._blocks.take_transfers()
        if owed is None or transfers is None:
            return owed or transfers
        demotions, drops = owed.demotions + transfers.demotions, owed.drops + transfers.drops
        return Transfers(transfers.saves, transfers.loads, demotions, drops)

    def _is_due(self, plan: StepPlan, result: StepResult) -> bool:
        """Take a step off those under way. False when it was applied before."""
        if result.step != plan.step:
            raise ContractError(f"the result of step {result.step} came for step {plan.step}; runners keep the order")
        in_flight = self._requests.in_flight
        if plan.step not in in_flight:
            return False
        if plan.step != in_flight[0]:
            raise ContractError(f"step {plan.step} is to be applied before step {in_flight[0]}; runners keep the order")
        in_flight.popleft()
        return True

    def _fail(self, request: Request, plan: StepPlan, result: StepResult) -> None:
        """End a request whose row was faulty. Not committed: nobody may find what a faulty step computed.

        Nonsense may come from blocks that others computed: then the request computes everything itself, once.
        """
        number = request.request_id
        if number in plan.drafts:
            request.num_planned_tokens = request.num_computed_tokens
        if number in result.unsound:
            self._blocks.quarantine(request)
            if number in self._requests.borrowers and not request.distrusts_cache:
                request.distrusts_cache = True
                self._requests.start_over(request)
                return
        request.error = result.faults[number]
        self._requests.end(request, FinishReason.ERROR)

    def _start_over(self, result: StepResult) -> None:
        """Take back what came from copies that are lost; rows that computed on them are void."""
        for request in self._blocks.forget_lost(result.lost):
            if request.status is RequestStatus.RUNNING:
                self._requests.start_over(request)

    def _commit(self, request: Request) -> None:
        self._blocks.commit(request)
        if request is self._requests.loner:
            self._blocks.free_cached_blocks()

    def _accept(self, request: Request, num_tokens: int, sampled: list[int]) -> list[int]:
        """Apply a row with guesses: `sampled` are those that were right, and the token after them.

        Returns the tokens appended. Where a refused guess spoils a state, nothing was computed unless all were right.
        """
        request.num_drafted_tokens += num_tokens - 1
        request.num_accepted_tokens += len(sampled) - 1
        new, reason = self._cut(request, sampled)
        request.token_ids += new
        all_accepted = len(new) == num_tokens
        if all_accepted or not self._blocks.drafts_are_atomic:
            request.num_computed_tokens += len(new)
        request.num_planned_tokens = request.num_computed_tokens
        self._blocks.settle_draft(request, all_accepted=all_accepted)
        if request.num_computed_tokens >= request.next_commit:
            self._commit(request)
        if reason is not None:
            self._requests.end(request, reason)
        return new

    def _append_tokens(self, request: Request, sampled: list[int]) -> list[int]:
        """Append sampled tokens up to the one that ends the request; return those appended.

        A request for hidden states has none and ends here: its last known token is computed.
        """
        if request.hidden:
            self._requests.end(request, FinishReason.STOP)
            return []
        request.num_pending_tokens -= 1
        token_ids = request.token_ids
        if len(sampled) == 1 and sampled[0] not in request.stop_ids and len(token_ids) + 1 < request.max_total_tokens:
            token_ids.append(sampled[0])
            return sampled
        new, reason = self._cut(request, sampled)
        request.token_ids += new
        if reason is not None:
            self._requests.end(request, reason)
        return new

    def _cut(self, request: Request, sampled: list[int]) -> tuple[list[int], FinishReason | None]:
        """Return the tokens up to the one that ends the request, and why it ends there."""
        num_tokens, sampling = len(request.token_ids), request.sampling
        # A form that is complete ends before the minimum: then nothing else was left to sample.
        min_tokens = 0 if sampling.structured is not None else request.num_prompt_tokens + sampling.min_tokens
        for count, token_id in enumerate(sampled, start=1):
            if token_id in request.stop_ids and num_tokens + count >= min_tokens:
                request.stop_token_id = token_id
                return sampled[:count], FinishReason.STOP
            if num_tokens + count >= request.max_total_tokens:
                return sampled[:count], FinishReason.LENGTH
        return sampled, None


def _room_made(plans: Sequence[StepPlan]) -> Transfers | None:
    """Return the demotions and drops of plans that may not have been carried out; None when there are none.

    The block manager counts on the room that they make. Saves and loads are not repeated: the blocks have other owners
    by now, and a copy that was not made is found to be lost when it is loaded.
    """
    made = [plan.transfers for plan in plans if plan.transfers]
    owed = Transfers(
        demotions=[h for each in made for h in each.demotions], drops=[h for each in made for h in each.drops]
    )
    return owed or None
