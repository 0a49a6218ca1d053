"""Core's scheduler: one rule under a token budget.

A step hands out at most `max_num_batched_tokens` tokens to at most `max_num_seqs` requests so that computed tokens
catch up with known ones. Prefill, chunked prefill, decode and recomputation after preemption are all this one rule.
Running requests come first, single tokens before prompt chunks, so that a long prompt never delays a decode; then
waiting requests are admitted in policy order. When blocks run out, the running request that is last in policy order
loses its blocks and waits again; the first one always progresses. Should even a request alone find no room, because
its own blocks or cached ones lie scattered over the slabs, it starts over from an empty cache and stays alone.
"""

import bisect

from zif.contract import (
    BlockManager,
    BlockUpdate,
    EngineConfig,
    FinishReason,
    Request,
    RequestStart,
    RequestStatus,
    Scheduler,
    SchedulerConstraints,
    StepPlan,
    StepResult,
    TokenUpdate,
)
from zif.errors import ContractError
from zif.scheduling.queue import RequestQueue, order_key


class TokenBudgetScheduler(Scheduler):
    """Schedule by token budget over a block manager."""

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        constraints: SchedulerConstraints = SchedulerConstraints(),  # noqa: B008 - frozen value
    ) -> None:
        self._token_budget = _token_budget(config, constraints)
        self._max_running = min(config.max_num_seqs, max(constraints.batch_buckets, default=config.max_num_seqs))
        self._blocks = block_manager
        self._key = order_key(config.scheduling_policy)
        self._waiting = RequestQueue(self._key)
        self._running: list[Request] = []
        self._requests: dict[int, Request] = {}
        self._released: list[int] = []
        self._step = 0
        self._in_flight: set[int] = set()
        self._num_ended = 0
        self._num_preemptions = 0
        self._blocked: tuple[int, int] | None = None
        self._loner: Request | None = None
        self._given_up: list[TokenUpdate] = []

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests, f"request id {request.request_id} is taken"
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def finish(self, request_id: int, reason: FinishReason) -> Request | None:
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, reason)
        self._running = [r for r in self._running if r is not request]
        return request

    def schedule(self) -> StepPlan | None:
        plan = StepPlan(step=self._step)
        budget = self._schedule_running(plan)
        if budget:
            self._admit(plan, budget)
        if not plan.request_ids and not self._released and not self._given_up:
            return None
        plan.released, self._released = self._released, []
        plan.total_tokens = sum(plan.num_tokens)
        self._in_flight.add(self._step)
        self._step += 1
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenUpdate]:
        if result.step != plan.step:
            raise ContractError(f"the result of step {result.step} came for step {plan.step}; runners keep the order")
        if plan.step not in self._in_flight:
            return []
        self._in_flight.remove(plan.step)
        updates, self._given_up = self._given_up, []
        num_ended = self._num_ended
        requests = self._requests
        for request_id, num_tokens, sampled in zip(plan.request_ids, plan.num_tokens, result.sampled, strict=True):
            request = requests.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue
            if request_id in result.faults:
                # Not committed: nobody may find what a faulty step computed.
                request.error = result.faults[request_id]
                self._end(request, FinishReason.ERROR)
                updates.append(TokenUpdate(request, []))
            else:
                request.num_computed_tokens += num_tokens
                if request.num_computed_tokens >= request.next_commit:
                    self._commit(request)
                if sampled:
                    updates.append(TokenUpdate(request, self._append_tokens(request, sampled)))
        if self._num_ended != num_ended:
            self._running = [r for r in self._running if r.status is RequestStatus.RUNNING]
        return updates

    def has_requests(self) -> bool:
        return bool(self._requests or self._released or self._given_up)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def live_requests(self) -> list[Request]:
        """Return every request that has not ended."""
        return list(self._requests.values())

    def _schedule_running(self, plan: StepPlan) -> int:
        """Plan the running requests; return what is left of the budget for admission."""
        num_preemptions = self._num_preemptions
        chunks: list[Request] = []
        singles: list[Request] = []
        for request in tuple(self._running):
            computed = request.num_computed_tokens
            if len(request.token_ids) - computed > 1:
                chunks.append(request)
            elif len(singles) < self._token_budget and (
                computed < request.capacity or self._make_room(plan, request, 1)
            ):
                singles.append(request)
        # Only now: room was made at the cost of later requests, so none of these has lost its blocks.
        _append_single_rows(plan, singles)
        budget = self._token_budget - len(singles)
        for request in chunks:
            num_tokens = self._chunk_tokens(request, budget)
            if num_tokens and self._make_room(plan, request, num_tokens):
                _append_row(plan, request, num_tokens)
                budget -= num_tokens
        return budget if self._num_preemptions == num_preemptions else 0

    def _chunk_tokens(self, request: Request, budget: int) -> int:
        """Return how many known tokens a step computes: what the budget allows, up to where the step should end."""
        computed = request.num_computed_tokens
        return self._blocks.step_end(request, min(request.num_tokens, computed + budget)) - computed

    def _make_room(self, plan: StepPlan, request: Request, num_tokens: int) -> bool:
        """Reserve slots for the next tokens, at the cost of later requests. False when `request` itself had to go."""
        if request.status is not RequestStatus.RUNNING:
            return False
        needed = request.num_computed_tokens + num_tokens
        if needed <= request.capacity:
            return True
        held = [len(blocks) for blocks in request.block_ids]
        while not self._blocks.reserve(request, needed):
            victim = self._running[-1]
            _remove_row(plan, victim)
            self._preempt(victim)
            if victim is request:
                return False
        for group, (start, blocks) in enumerate(zip(held, request.block_ids, strict=True)):
            if len(blocks) > start:
                plan.block_updates.append(BlockUpdate(request.request_id, group, start, blocks[start:]))
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._blocks.release(request)
        self._released.append(request.request_id)
        self._num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._waiting.push(request)
        if not self._running:
            self._isolate(request)

    def _isolate(self, request: Request) -> None:
        """Let a request run alone from an empty cache, where every slab it fills, it fills entirely."""
        self._loner = request
        self._blocks.reset_prefix_cache()

    def _commit(self, request: Request) -> None:
        self._blocks.commit(request)
        if request is self._loner:
            self._blocks.reset_prefix_cache()

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting requests in policy order until one does not fit."""
        deferred: list[Request] = []
        while budget and len(self._running) < (1 if self._loner else self._max_running):
            request = self._waiting.peek()
            if request is None or self._is_blocked(request):
                break
            source = _sample_source(request)
            if source is None and _awaits_sibling(request):
                deferred.append(self._waiting.pop())
                continue
            if self._start(plan, request, source, budget):
                budget -= plan.num_tokens[-1]
            elif self._running:
                self._blocked = (request.request_id, self._num_ended + self._num_preemptions)
                break
            elif request is self._loner:
                self._give_up(request)
            else:
                self._isolate(request)
        for request in deferred:
            self._waiting.push(request)

    def _give_up(self, request: Request) -> None:
        """End a request that found no room alone in an empty cache: waiting would stop everybody behind it."""
        request.error = (
            f"no KV blocks for {request.num_tokens} tokens, although no other request holds any: give the engine more "
            "kv_bytes, or the request fewer tokens"
        )
        self._end(request, FinishReason.ERROR)
        self._given_up.append(TokenUpdate(request, []))

    def _is_blocked(self, request: Request) -> bool:
        """Say whether the request did not fit before and nothing has been given back since."""
        return bool(self._running) and self._blocked == (request.request_id, self._num_ended + self._num_preemptions)

    def _start(self, plan: StepPlan, request: Request, source: Request | None, budget: int) -> bool:
        self._blocks.begin(request, source)
        computed = request.num_computed_tokens
        num_tokens = self._chunk_tokens(request, budget)
        room = not self._running or self._blocks.can_hold(request, request.num_tokens)
        if not room or not self._blocks.reserve(request, computed + num_tokens):
            self._blocks.release(request)
            request.num_computed_tokens = 0
            return False
        self._waiting.pop()
        bisect.insort(self._running, request, key=self._key)
        if not request.num_preemptions:
            request.num_cached_tokens = computed
        request.status = RequestStatus.RUNNING
        plan.started.append(_request_start(request))
        _append_row(plan, request, num_tokens)
        return True

    def _append_tokens(self, request: Request, sampled: list[int]) -> list[int]:
        """Append sampled tokens up to the one that ends the request; return those appended."""
        token_ids = request.token_ids
        for count, token_id in enumerate(sampled, start=1):
            token_ids.append(token_id)
            if token_id in request.stop_ids and request.num_output_tokens >= request.sampling.min_tokens:
                request.stop_token_id = token_id
                self._end(request, FinishReason.STOP)
                return sampled[:count]
            if len(token_ids) >= request.max_total_tokens:
                self._end(request, FinishReason.LENGTH)
                return sampled[:count]
        return sampled

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status is RequestStatus.RUNNING:
            self._released.append(request.request_id)
        else:
            self._waiting.discard(request)
        self._blocks.release(request)
        self._num_ended += 1
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.siblings = ()
        if request is self._loner:
            self._loner = None
        del self._requests[request.request_id]


def _append_row(plan: StepPlan, request: Request, num_tokens: int) -> None:
    computed = request.num_computed_tokens
    plan.request_ids.append(request.request_id)
    plan.num_computed.append(computed)
    plan.num_tokens.append(num_tokens)
    plan.samples.append(computed + num_tokens == len(request.token_ids))


def _append_single_rows(plan: StepPlan, requests: list[Request]) -> None:
    """Append a row of one token, which samples, for each request: column by column, as most steps are only this."""
    plan.request_ids += [request.request_id for request in requests]
    plan.num_computed += [request.num_computed_tokens for request in requests]
    plan.num_tokens += [1] * len(requests)
    plan.samples += [True] * len(requests)


def _remove_row(plan: StepPlan, request: Request) -> None:
    """Take a request that was planned in this very step out of the plan again."""
    plan.block_updates = [u for u in plan.block_updates if u.request_id != request.request_id]
    if request.request_id in plan.request_ids:
        row = plan.request_ids.index(request.request_id)
        for column in (plan.request_ids, plan.num_computed, plan.num_tokens, plan.samples):
            del column[row]


def _request_start(request: Request) -> RequestStart:
    return RequestStart(
        request_id=request.request_id,
        token_ids=request.token_ids.copy(),
        num_prompt_tokens=request.num_prompt_tokens,
        block_ids=tuple(blocks.copy() for blocks in request.block_ids),
        sampling=request.sampling,
        seed=request.seed,
        stop_ids=request.stop_ids,
        bad_words_ids=request.bad_words_ids,
    )


def _sample_source(request: Request) -> Request | None:
    """Return a running sibling that has computed the whole prompt."""
    return next((s for s in request.siblings if s.block_ids and s.num_computed_tokens >= s.num_prompt_tokens), None)


def _awaits_sibling(request: Request) -> bool:
    """Say whether a sibling is computing the prompt now."""
    return any(s.status is RequestStatus.RUNNING for s in request.siblings)


def _token_budget(config: EngineConfig, constraints: SchedulerConstraints) -> int:
    if constraints.separate_prefill or constraints.token_alignment != 1:
        raise ContractError(
            "core's scheduler does not honour separate_prefill or token_alignment; "
            "the platform must bring its own through the hook zif_scheduler"
        )
    return min(config.max_num_batched_tokens, max(constraints.token_buckets, default=config.max_num_batched_tokens))
