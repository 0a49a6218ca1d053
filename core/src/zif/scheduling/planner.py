"""Fill one step: who computes which tokens.

Decodes come first, so that a prompt never delays one: running requests that lack a token, or the few that refused
guesses left behind, with guesses of their own if there are slots. Then prompts, running and waiting ones merged in
policy order: each gets its share, what is left over goes round again.

When blocks run out, the running request that is last in policy order loses its blocks; the first one always
progresses. Nobody loses blocks while steps are under way: planning ahead then stops, and goes on when they are applied.
Should even a request alone find no room, because its own blocks or cached ones lie scattered over the slabs, it starts
over from an empty cache and stays alone.
"""

from zif.contract import BlockManager, Draft, FinishReason, Request, RequestStatus, StepPlan
from zif.scheduling.admission import Look, awaits_sibling, no_room_error, sample_source
from zif.scheduling.lifecycle import Lifecycle
from zif.scheduling.limits import StepLimits
from zif.scheduling.rows import (
    StepDraft,
    append_block_updates,
    append_row,
    append_single_rows,
    count_planned,
    extend_row,
    remove_row,
    request_start,
)


class StepPlanner:
    """Plan steps over the requests of one scheduler."""

    def __init__(self, limits: StepLimits, requests: Lifecycle, blocks: BlockManager) -> None:
        self._limits = limits
        self._requests = requests
        self._blocks = blocks
        self._prompts_are_next = True
        self._stalled = False

    @property
    def stalled(self) -> bool:
        """Say whether planning ahead has to wait for the steps under way."""
        self._stalled = self._stalled and bool(self._requests.in_flight)
        return self._stalled

    def fill(self, plan: StepPlan) -> None:
        """Add rows to an empty plan."""
        draft = StepDraft(plan, self._limits.max_tokens, self._limits.max_tokens)
        if self._limits.separate_prefill:
            self._fill_with_one_sort(draft)
        else:
            self._add_prompts(draft, self._add_decodes(draft))
        plan.total_tokens = sum(plan.num_tokens)
        count_planned(plan, draft.rows)

    def _fill_with_one_sort(self, draft: StepDraft) -> None:
        """Plan either prompts or decodes, in turns when there are both."""
        for is_prompts in (self._prompts_are_next, not self._prompts_are_next):
            if is_prompts:
                self._add_prompts(draft, [r for r in self._requests.running if r.num_tokens - r.num_planned_tokens > 1])
            else:
                self._add_decodes(draft)
            if draft.plan.request_ids:
                self._prompts_are_next = not is_prompts
                return

    def _catches_up(self, request: Request, num_lacking: int) -> bool:
        """Say whether what a request lacks, more than one token, is computed among decodes: refused guesses left it."""
        return (
            num_lacking <= self._limits.max_draft_tokens + 1
            and request.num_planned_tokens >= request.num_prompt_tokens
            and not self._limits.separate_prefill
        )

    def _add_decodes(self, draft: StepDraft) -> list[Request]:
        """Plan the running requests that decode; return those that compute a prompt, in order."""
        plan, left, num_preemptions = draft.plan, draft.num_tokens_left, self._requests.num_preemptions
        prompts: list[Request] = []
        singles: list[Request] = []
        for request in tuple(self._requests.running):
            planned = request.num_planned_tokens
            lacking = len(request.token_ids) + request.num_pending_tokens - planned
            if lacking > 1:
                if self._catches_up(request, lacking) and lacking <= left:
                    left -= self._catch_up(draft, request, lacking)
                else:
                    prompts.append(request)
            elif lacking < 1 or not left or planned + 1 >= request.max_total_tokens:
                continue
            elif request.draft_token_ids and (num_tokens := self._guess(draft, request, left)):
                left -= num_tokens
            elif planned < request.capacity or self._make_room(draft, request, planned + 1):
                singles.append(request)
                left -= 1
            elif self._stalled:
                break
        # Only now: room was made at the cost of later requests, so none of these has lost its blocks.
        append_single_rows(plan, singles)
        draft.num_tokens_left = 0 if self._stalled else left
        draft.admits = draft.admits and self._requests.num_preemptions == num_preemptions
        return [] if self._stalled else prompts

    def _catch_up(self, draft: StepDraft, request: Request, num_lacking: int) -> int:
        """Plan what refused guesses left behind; return the tokens planned."""
        end = request.num_planned_tokens + num_lacking
        if not self._make_room(draft, request, end):
            return 0
        append_row(draft, request, end)
        return num_lacking

    def _guess(self, draft: StepDraft, request: Request, max_tokens: int) -> int:
        """Plan one token and the guesses that follow it; return the tokens planned, 0 when there is no room for any."""
        guesses, request.draft_token_ids = request.draft_token_ids, []
        known = request.num_tokens
        count = min(len(guesses), self._limits.max_draft_tokens, max_tokens - 1, request.max_total_tokens - known - 1)
        if count < 1 or request.num_pending_tokens:
            return 0
        held = [len(blocks) for blocks in request.block_ids]
        state_blocks = self._blocks.reserve_draft(request, known + count)
        if state_blocks is None:
            return 0
        append_block_updates(draft.plan, request, held)
        draft.plan.drafts[request.request_id] = Draft(guesses[:count], state_blocks)
        append_row(draft, request, known + count)
        return count + 1

    def _add_prompts(self, draft: StepDraft, chunks: list[Request]) -> None:
        """Plan prompts, running and waiting ones merged in policy order."""
        if len(chunks) + len(self._requests.waiting) > 1:
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
        if end == request.num_planned_tokens:
            # Later ones must not take, step after step, the few tokens that do not reach the next place to cut.
            draft.num_tokens_left = 0
        elif self._has_slot(draft, request, end) and self._make_room(draft, request, end):
            self._append_prompt(draft, request, end)

    def _append_prompt(self, draft: StepDraft, request: Request, end: int) -> None:
        draft.num_tokens_left -= end - request.num_planned_tokens
        draft.num_partial += end < request.num_tokens
        draft.prompts.append(request)
        append_row(draft, request, end)

    def _extend(self, draft: StepDraft, request: Request) -> None:
        """Give a planned prompt what the others left over, if there are free blocks for it."""
        if request.status is not RequestStatus.RUNNING:
            return
        planned = draft.plan.num_tokens[draft.plan.request_ids.index(request.request_id)]
        end = self._chunk_end(request, planned + draft.num_tokens_left)
        num_more = end - request.num_planned_tokens - planned
        if num_more <= 0:
            return
        held = [len(blocks) for blocks in request.block_ids]
        if end > request.capacity and not self._blocks.reserve(request, end):
            return
        append_block_updates(draft.plan, request, held)
        extend_row(draft.plan, request, end)
        draft.num_tokens_left -= num_more

    def _has_slot(self, draft: StepDraft, request: Request, end: int) -> bool:
        """Say whether the prompt is done with this chunk, or may be one of those that are computed in part."""
        return end == request.num_tokens or draft.num_partial < self._limits.max_partial_prefills

    def _chunk_end(self, request: Request, num_tokens: int) -> int:
        """Return up to where a step computes a prompt: what the limits allow, or a checkpoint before that."""
        end = self._limits.cut(request, num_tokens)
        checkpoint = self._blocks.step_end(request, end)
        return end if checkpoint % self._limits.token_alignment else checkpoint

    def _make_room(self, draft: StepDraft, request: Request, num_tokens: int) -> bool:
        """Reserve slots for `num_tokens` tokens, at the cost of later requests. False when `request` cannot go on."""
        if request.status is not RequestStatus.RUNNING:
            return False
        if num_tokens <= request.capacity:
            return True
        held = [len(blocks) for blocks in request.block_ids]
        while not self._blocks.reserve(request, num_tokens):
            draft.admits = False
            if self._requests.in_flight:
                self._stalled = True
                draft.num_tokens_left = 0
                return False
            victim = self._requests.running[-1]
            remove_row(draft, victim)
            self._preempt(victim)
            if victim is request:
                return False
        append_block_updates(draft.plan, request, held)
        return True

    def _preempt(self, request: Request) -> None:
        self._requests.preempt(request)
        if not self._requests.running:
            self._requests.isolate(request)

    def _admit(self, draft: StepDraft, before: Request | None = None) -> None:
        """Start waiting requests in policy order, those ahead of `before` only; pass the ones that cannot start."""
        waiting, admission = self._requests.waiting, self._requests.admission
        if not waiting or admission.settled:
            return
        admission.begin_look()
        look = Look()
        while draft.admits and draft.num_tokens_left and self._has_place() and self._admit_next(draft, look, before):
            pass
        for request in look.passed + look.unready:
            waiting.put_back(request)

    def _admit_next(self, draft: StepDraft, look: Look, before: Request | None) -> bool:
        """Start or pass the first waiting request. False when none after it may start."""
        requests, waiting = self._requests, self._requests.waiting
        request = waiting.peek()
        if request is None or (look.passed and not requests.admission.may_look_on(look, requests.clock())):
            requests.admission.end_look(look)
            return False
        if before is not None and waiting.order_of(request) > before.order:
            return False
        if not requests.trials.admits(request):
            look.unready.append(waiting.pop())
            return True
        source = sample_source(request)
        if source is None and awaits_sibling(request):
            look.unready.append(waiting.pop())
        elif self._start(draft, request, source):
            look.count_bypass()
        elif requests.running or requests.in_flight:
            look.passed.append(waiting.pop())
        elif look.cache_is_empty:
            # Waiting would stop everybody behind it.
            requests.end_early(request, FinishReason.ERROR, no_room_error(request))
        else:
            look.cache_is_empty = True
            requests.isolate(request)
        return True

    def _has_place(self) -> bool:
        return len(self._requests.running) < (1 if self._requests.loner else self._limits.max_requests)

    def _start(self, draft: StepDraft, request: Request, source: Request | None) -> bool:
        running, admission = self._requests.running, self._requests.admission
        if running and (admission.is_refused(request) or self._lacks_slot(draft, request)):
            return False
        self._blocks.begin(request, source)
        request.num_planned_tokens = request.num_computed_tokens
        assert request.num_computed_tokens < request.num_tokens, "the block manager left no token to compute"
        end = self._chunk_end(request, min(draft.num_tokens_left, draft.max_chunk_tokens))
        is_whole = end > request.num_computed_tokens and self._has_slot(draft, request, end)
        has_room = is_whole and (not running or admission.has_room(request, running))
        if not has_room or not self._blocks.reserve(request, end):
            self._blocks.release(request)
            request.num_computed_tokens = request.num_planned_tokens = 0
            if is_whole:
                admission.refuse(request)
            return False
        self._requests.take_place(request, draft.plan.step)
        draft.plan.started.append(request_start(request))
        self._append_prompt(draft, request, end)
        return True

    def _lacks_slot(self, draft: StepDraft, request: Request) -> bool:
        """Say, without a new look-up of its prefix, that the prompt would not end in this step and may not be cut."""
        if request.prefix is None or draft.num_partial < self._limits.max_partial_prefills:
            return False
        max_tokens = min(draft.num_tokens_left, draft.max_chunk_tokens)
        return request.num_tokens - request.prefix.num_tokens > max_tokens
