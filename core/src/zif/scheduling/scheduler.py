"""Core's scheduler: one rule under a token budget.

A step hands out tokens to requests so that computed tokens catch up with known ones. Prefill, chunked prefill, decode
and recomputation after preemption are all this one rule. Single tokens of running requests come first, so that a prompt
never delays a decode. Then prompts, running and waiting ones merged in policy order: each gets its share, what is left
over goes round again. A waiting request that cannot start is passed by later ones, but only so often.

When blocks run out, the running request that is last in policy order loses its blocks and waits again; the first one
always progresses. Should even a request alone find no room, because its own blocks or cached ones lie scattered over
the slabs, it starts over from an empty cache and stays alone.

Elsewhere: order (`policies.py`, `queue.py`), what fits (`admission.py`, `limits.py`), writing a plan (`rows.py`).
"""

import bisect
import time
from collections.abc import Callable

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
)
from zif.errors import ContractError
from zif.scheduling.admission import Admission, Look, awaits_sibling, no_room_error, sample_source
from zif.scheduling.deadlines import Deadlines, overdue_error
from zif.scheduling.limits import step_limits
from zif.scheduling.policies import PATIENCE_S, policy_of
from zif.scheduling.queue import RequestQueue
from zif.scheduling.rows import (
    StepDraft,
    append_block_updates,
    append_row,
    append_single_rows,
    extend_row,
    remove_row,
    request_start,
)


class TokenBudgetScheduler(Scheduler):
    """Schedule by token budget over a block manager. `clock` gives seconds that never fall; deadlines refer to it."""

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        constraints: SchedulerConstraints = SchedulerConstraints(),  # noqa: B008 - frozen value
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = step_limits(config, constraints)
        self._blocks = block_manager
        self._clock = clock
        self._policy = policy_of(config)
        self._waiting = RequestQueue(self._policy)
        self._admission = Admission(config, block_manager)
        self._deadlines = Deadlines()
        self._running: list[Request] = []
        self._requests: dict[int, Request] = {}
        self._released: list[int] = []
        self._ended_early: list[TokenUpdate] = []
        self._step = 0
        self._in_flight: set[int] = set()
        self._num_ended = 0
        self._num_preemptions = 0
        self._loner: Request | None = None
        self._prompts_are_next = True

    def add(self, request: Request) -> None:
        assert request.request_id not in self._requests, f"request id {request.request_id} is taken"
        self._requests[request.request_id] = request
        request.due_s = self._clock() + PATIENCE_S
        if request.deadline_s is not None:
            request.due_s = min(request.due_s, request.deadline_s)
            self._deadlines.add(request)
        self._waiting.push(request)
        self._admission.unsettle()

    def finish(self, request_id: int, reason: FinishReason) -> Request | None:
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, reason)
        self._running = [r for r in self._running if r is not request]
        return request

    def schedule(self) -> StepPlan | None:
        if self._deadlines:
            self._end_overdue()
        plan = StepPlan(step=self._step)
        draft = StepDraft(plan, self._limits.max_tokens, self._limits.max_tokens)
        if self._limits.separate_prefill:
            self._plan_one_sort(draft)
        else:
            self._add_prompts(draft, self._add_singles(draft))
        if not plan.request_ids and not self._released and not self._ended_early:
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
        updates, self._ended_early = self._ended_early, []
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
        return bool(self._requests or self._released or self._ended_early)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def live_requests(self) -> list[Request]:
        """Return every request that has not ended."""
        return list(self._requests.values())

    def _end_overdue(self) -> None:
        now_s = self._clock()
        for request in self._deadlines.pop_passed(now_s):
            request.error = overdue_error(request, now_s)
            self.finish(request.request_id, FinishReason.ABORT)
            self._ended_early.append(TokenUpdate(request, []))

    def _plan_one_sort(self, draft: StepDraft) -> None:
        """Plan either prompts or single tokens, in turns when there are both."""
        for is_prompts in (self._prompts_are_next, not self._prompts_are_next):
            if is_prompts:
                self._add_prompts(draft, [r for r in self._running if r.num_tokens - r.num_computed_tokens > 1])
            else:
                self._add_singles(draft)
            if draft.plan.request_ids:
                self._prompts_are_next = not is_prompts
                return

    def _add_singles(self, draft: StepDraft) -> list[Request]:
        """Plan the running requests that lack one token; return those that lack more, in order."""
        plan, max_tokens, num_preemptions = draft.plan, draft.num_tokens_left, self._num_preemptions
        chunks: list[Request] = []
        singles: list[Request] = []
        for request in tuple(self._running):
            computed = request.num_computed_tokens
            if len(request.token_ids) - computed > 1:
                chunks.append(request)
            elif len(singles) < max_tokens and (computed < request.capacity or self._make_room(draft, request, 1)):
                singles.append(request)
        # Only now: room was made at the cost of later requests, so none of these has lost its blocks.
        append_single_rows(plan, singles)
        draft.num_tokens_left -= len(singles)
        draft.admits = draft.admits and self._num_preemptions == num_preemptions
        return chunks

    def _add_prompts(self, draft: StepDraft, chunks: list[Request]) -> None:
        """Plan prompts, running and waiting ones merged in policy order."""
        if len(chunks) + len(self._waiting) > 1:
            draft.max_chunk_tokens = self._limits.max_chunk_tokens
        for request in chunks:
            self._admit(draft, before=request)
            self._continue(draft, request)
        self._admit(draft)
        for request in draft.prompts:
            if not draft.num_tokens_left:
                return
            self._extend(draft, request)

    def _continue(self, draft: StepDraft, request: Request) -> None:
        """Plan the next chunk of a running prompt."""
        if request.status is not RequestStatus.RUNNING:
            return
        end = self._chunk_end(request, min(draft.num_tokens_left, draft.max_chunk_tokens))
        if end == request.num_computed_tokens:
            # Later ones must not take, step after step, the few tokens that do not reach the next place to cut.
            draft.num_tokens_left = 0
        elif self._has_slot(draft, request, end) and self._make_room(draft, request, end - request.num_computed_tokens):
            self._append_prompt(draft, request, end)

    def _append_prompt(self, draft: StepDraft, request: Request, end: int) -> None:
        append_row(draft.plan, request, end)
        draft.prompts.append(request)
        draft.num_tokens_left -= end - request.num_computed_tokens
        draft.num_partial += end < request.num_tokens

    def _extend(self, draft: StepDraft, request: Request) -> None:
        """Give a planned prompt what the others left over, if there are free blocks for it."""
        if request.status is not RequestStatus.RUNNING:
            return
        planned = draft.plan.num_tokens[draft.plan.request_ids.index(request.request_id)]
        end = self._chunk_end(request, planned + draft.num_tokens_left)
        if end <= request.num_computed_tokens + planned:
            return
        held = [len(blocks) for blocks in request.block_ids]
        if end > request.capacity and not self._blocks.reserve(request, end):
            return
        append_block_updates(draft.plan, request, held)
        extend_row(draft.plan, request, end)
        draft.num_tokens_left -= end - request.num_computed_tokens - planned

    def _has_slot(self, draft: StepDraft, request: Request, end: int) -> bool:
        """Say whether the prompt is done with this chunk, or may be one of those that are computed in part."""
        return end == request.num_tokens or draft.num_partial < self._limits.max_partial_prefills

    def _chunk_end(self, request: Request, num_tokens: int) -> int:
        """Return up to where a step computes a prompt: what the limits allow, or a checkpoint before that."""
        end = self._limits.cut(request, num_tokens)
        checkpoint = self._blocks.step_end(request, end)
        return end if checkpoint % self._limits.token_alignment else checkpoint

    def _make_room(self, draft: StepDraft, request: Request, num_tokens: int) -> bool:
        """Reserve slots for the next tokens, at the cost of later requests. False when `request` itself had to go."""
        if request.status is not RequestStatus.RUNNING:
            return False
        needed = request.num_computed_tokens + num_tokens
        if needed <= request.capacity:
            return True
        held = [len(blocks) for blocks in request.block_ids]
        while not self._blocks.reserve(request, needed):
            victim = self._running[-1]
            remove_row(draft.plan, victim)
            self._preempt(victim)
            draft.admits = False
            if victim is request:
                return False
        append_block_updates(draft.plan, request, held)
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
        self._admission.preempt()
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

    def _admit(self, draft: StepDraft, before: Request | None = None) -> None:
        """Start waiting requests in policy order, those ahead of `before` only; pass the ones that cannot start."""
        if not self._waiting or self._admission.settled:
            return
        self._admission.begin_look()
        look = Look()
        while draft.admits and draft.num_tokens_left and self._has_place() and self._admit_next(draft, look, before):
            pass
        for request in look.passed + look.unready:
            self._waiting.put_back(request)

    def _admit_next(self, draft: StepDraft, look: Look, before: Request | None) -> bool:
        """Start or pass the first waiting request. False when none after it may start."""
        request = self._waiting.peek()
        if request is None or (look.passed and not self._admission.may_look_on(look, self._clock())):
            self._admission.end_look(look)
            return False
        if before is not None and self._waiting.order_of(request) > before.order:
            return False
        source = sample_source(request)
        if source is None and awaits_sibling(request):
            look.unready.append(self._waiting.pop())
        elif self._start(draft, request, source):
            look.count_bypass()
        elif self._running:
            look.passed.append(self._waiting.pop())
        elif look.cache_is_empty:
            self._give_up(request)
        else:
            look.cache_is_empty = True
            self._isolate(request)
        return True

    def _has_place(self) -> bool:
        return len(self._running) < (1 if self._loner else self._limits.max_requests)

    def _give_up(self, request: Request) -> None:
        """End a request that found no room alone in an empty cache: waiting would stop everybody behind it."""
        request.error = no_room_error(request)
        self._end(request, FinishReason.ERROR)
        self._ended_early.append(TokenUpdate(request, []))

    def _start(self, draft: StepDraft, request: Request, source: Request | None) -> bool:
        if self._running and (self._admission.is_refused(request) or self._lacks_slot(draft, request)):
            return False
        self._blocks.begin(request, source)
        assert request.num_computed_tokens < request.num_tokens, "the block manager left no token to compute"
        end = self._chunk_end(request, min(draft.num_tokens_left, draft.max_chunk_tokens))
        is_whole = end > request.num_computed_tokens and self._has_slot(draft, request, end)
        has_room = is_whole and (not self._running or self._admission.has_room(request, self._running))
        if not has_room or not self._blocks.reserve(request, end):
            self._blocks.release(request)
            request.num_computed_tokens = 0
            if is_whole:
                self._admission.refuse(request)
            return False
        self._take_place(request)
        draft.plan.started.append(request_start(request))
        self._append_prompt(draft, request, end)
        return True

    def _lacks_slot(self, draft: StepDraft, request: Request) -> bool:
        """Say, without a new look-up of its prefix, that the prompt would not end in this step and may not be cut."""
        if request.prefix is None or draft.num_partial < self._limits.max_partial_prefills:
            return False
        max_tokens = min(draft.num_tokens_left, draft.max_chunk_tokens)
        return request.num_tokens - request.prefix.num_tokens > max_tokens

    def _take_place(self, request: Request) -> None:
        """Move a request from the waiting to the running ones."""
        order = self._waiting.order_of(request)
        self._waiting.pop()
        if not request.order:
            request.order = order
            request.num_cached_tokens = request.num_computed_tokens
            num_known = request.num_tokens - request.num_computed_tokens
            self._policy.admit(request, num_known + self._admission.num_expected(request))
        bisect.insort(self._running, request, key=_order)
        self._admission.start(request)
        request.status = RequestStatus.RUNNING

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
        self._deadlines.remove(request)
        self._admission.end(request)
        self._policy.end(request)
        self._waiting.reconsider(self._policy.line(request))


def _order(request: Request) -> tuple[float, ...]:
    return request.order
