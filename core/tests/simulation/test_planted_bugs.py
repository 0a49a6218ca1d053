"""Bugs planted on purpose: the simulation must notice each of them within 200,000 steps.

Each is a mistake that somebody could make, as one patch of a method. A bug that no check sees would pass for working
code, so this is the test of the checks.
"""

from dataclasses import replace

import pytest

from zif.contract import (
    ChunkedLocalSpec,
    CompletedStep,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVSpec,
    PrefixMiss,
    PrefixReport,
    RecurrentStateSpec,
    RequestStatus,
    SlidingWindowSpec,
    Transfers,
)
from zif.kv import hashing, manager
from zif.kv.drafts import DraftSlots
from zif.kv.loading import LoadLedger
from zif.kv.manager import PagedBlockManager
from zif.kv.pool import BlockPool
from zif.kv.prefix import PrefixFinder
from zif.kv.slabs import HeldSlabs
from zif.kv.swap import SwapSpace
from zif.kv.tiers import TierIndex
from zif.scheduling import admission, lifecycle, planner, scheduler
from zif.scheduling.deadlines import Deadlines
from zif.scheduling.lifecycle import Lifecycle
from zif.scheduling.queue import RequestQueue
from zif.scheduling.scheduler import TokenBudgetScheduler
from zif.scheduling.trials import Trials
from zif.simulation import Campaign, SimulatedRunner, SimulationFailure, run_scenarios
from zif.simulation import runner as simulation_runner

pytestmark = pytest.mark.slow

MAX_STEPS = 200_000


def window_off_by_one(monkeypatch):
    original = SlidingWindowSpec.first_needed_token
    monkeypatch.setattr(SlidingWindowSpec, "first_needed_token", lambda self, n: original(self, n + 1))


def window_never_released(monkeypatch):
    monkeypatch.setattr(SlidingWindowSpec, "first_needed_token", lambda self, n: 0)


def chunk_ends_one_token_early(monkeypatch):
    original = ChunkedLocalSpec.first_needed_token
    monkeypatch.setattr(ChunkedLocalSpec, "first_needed_token", lambda self, n: original(self, n + 1))


def state_given_back_before_it_is_read(monkeypatch):
    monkeypatch.setattr(RecurrentStateSpec, "first_needed_token", lambda self, n: n)


def state_indexed_in_the_middle_of_a_block(monkeypatch):
    monkeypatch.setattr(RecurrentStateSpec, "reusable_blocks", KVSpec.reusable_blocks)


def last_block_of_a_request_is_not_reserved(monkeypatch):
    monkeypatch.setattr(FullAttentionSpec, "num_blocks", lambda self, n: n // self.block_size)


def preemption_leaks_blocks(monkeypatch):
    original = PagedBlockManager.release

    def release(self, request):
        if request.status is RequestStatus.PREEMPTED or request.num_preemptions:
            request.block_ids, request.capacity = (), 0
        else:
            original(self, request)

    monkeypatch.setattr(PagedBlockManager, "release", release)


def abort_of_a_preempted_request_leaks_its_place(monkeypatch):
    original = TokenBudgetScheduler.finish

    def finish(self, request_id, reason):
        request = self._requests.requests.get(request_id)
        preempted = request is not None and request.status is RequestStatus.PREEMPTED
        ended = original(self, request_id, reason)
        if preempted:
            self._requests.waiting.put_back(request)
        return ended

    monkeypatch.setattr(TokenBudgetScheduler, "finish", finish)


def abort_of_a_running_request_leaves_it_running(monkeypatch):
    original = TokenBudgetScheduler.finish

    def finish(self, request_id, reason):
        running = list(self._requests.running)
        ended = original(self, request_id, reason)
        self._requests.running = running
        return ended

    monkeypatch.setattr(TokenBudgetScheduler, "finish", finish)


def hit_across_salts(monkeypatch):
    original = hashing.root_content
    monkeypatch.setattr(hashing, "root_content", lambda key, size: original(replace(key, salt=""), size))


def blocks_named_by_their_own_tokens_only(monkeypatch):
    def extend(self, num_blocks):
        self._digests += [hashing.digest_of(tokens) for tokens in self._tokens(self.num_hashed, num_blocks)]

    monkeypatch.setattr(hashing.PrefixChain, "extend", extend)
    monkeypatch.setattr(hashing.PrefixChain, "contents", lambda self, first, end: [*self._tokens(first, end)])
    monkeypatch.setattr(hashing.PrefixChain, "content", lambda self, block: self._tokens(block, block + 1)[0])


def last_block_released_twice(monkeypatch):
    original = PagedBlockManager.release

    def release(self, request):
        held = [blocks[-1:] for blocks in request.block_ids]
        original(self, request)
        for pool, blocks in zip(self._pools, held, strict=False):
            manager._release_all(pool, blocks)

    monkeypatch.setattr(PagedBlockManager, "release", release)


def released_window_block_stays_in_the_table(monkeypatch):
    original = PagedBlockManager.commit

    def commit(self, request):
        before = [blocks.copy() for blocks in request.block_ids]
        original(self, request)
        for blocks, old in zip(request.block_ids, before, strict=True):
            blocks[: len(old)] = old

    monkeypatch.setattr(PagedBlockManager, "commit", commit)


def one_null_entry_too_many(monkeypatch):
    original = PrefixFinder.find

    def find(self, request, max_tokens):
        prefix = original(self, request, max_tokens)
        for blocks in prefix.block_ids:
            visible = [index for index, block in enumerate(blocks) if block]
            if visible:
                blocks[visible[0]] = 0
        return prefix

    monkeypatch.setattr(PrefixFinder, "find", find)


def prefixes_are_never_found(monkeypatch):
    report = PrefixReport(0, 0, PrefixMiss.NOT_SEEN)
    monkeypatch.setattr(PrefixFinder, "find", lambda self, request, max_tokens: self.nothing(report))


def a_prefix_is_cut_by_a_block(monkeypatch):
    original = PrefixFinder.find
    monkeypatch.setattr(
        PrefixFinder,
        "find",
        lambda self, request, max_tokens: original(self, request, max(0, max_tokens - self._alignment)),
    )


def sibling_shares_the_block_that_is_half_full(monkeypatch):
    original = PrefixFinder.of_source

    def of_source(self, source, max_tokens):
        prefix = original(self, source, max_tokens)
        for blocks, held in zip(prefix.block_ids, source.block_ids, strict=True):
            blocks += [block for block in held[len(blocks) : len(blocks) + 1] if block and blocks]
        return prefix

    monkeypatch.setattr(PrefixFinder, "of_source", of_source)


def blocks_indexed_before_they_are_computed(monkeypatch):
    original = PagedBlockManager.reserve

    def reserve(self, request, num_tokens):
        done = original(self, request, num_tokens)
        computed = request.num_computed_tokens
        request.num_computed_tokens = min(request.num_tokens, request.capacity)
        for group, spec in enumerate(self._specs):
            if self._caching and done and not spec.keeps_checkpoints:
                self._index_new_blocks(request, group)
        request.num_computed_tokens = computed
        return done

    monkeypatch.setattr(PagedBlockManager, "reserve", reserve)


def sharing_does_not_count(monkeypatch):
    original = BlockPool.share_all
    monkeypatch.setattr(
        BlockPool, "share_all", lambda self, blocks: original(self, [b for b in blocks if not self._references[b]])
    )


def evicted_blocks_stay_findable(monkeypatch):
    def evict(self, block, **_):
        self._order.remove(block)
        self._put_free(block)

    monkeypatch.setattr(BlockPool, "_evict", evict)


def slabs_with_owned_blocks_are_taken(monkeypatch):
    def surrender_slab(self, *, evict):
        slab = next(iter(self.slabs), None) if evict else None
        if slab is not None:
            HeldSlabs.give_up(self._slabs, slab)
        return slab

    monkeypatch.setattr(BlockPool, "surrender_slab", surrender_slab)


def failed_allocation_keeps_a_block(monkeypatch):
    original = BlockPool.allocate

    def allocate(self, num_blocks):
        blocks = original(self, num_blocks)
        if blocks is None:
            original(self, 1)
        return blocks

    monkeypatch.setattr(BlockPool, "allocate", allocate)


def the_last_token_is_found_too(monkeypatch):
    original = PagedBlockManager._longest_prefix

    def longest_prefix(self, request, source, finder):
        request.token_ids.append(0)
        try:
            return original(self, request, source, finder)
        finally:
            request.token_ids.pop()

    monkeypatch.setattr(PagedBlockManager, "_longest_prefix", longest_prefix)


def the_runner_is_not_told_of_released_requests(monkeypatch):
    original = SimulatedRunner.submit
    monkeypatch.setattr(SimulatedRunner, "submit", lambda self, step: original(self, replace(step, released=[])))


def the_runner_is_not_told_of_new_blocks(monkeypatch):
    monkeypatch.setattr(planner, "append_block_updates", lambda plan, request, held: None)


def chunks_sample_before_the_prompt_ends(monkeypatch):
    original = planner.append_row

    def append_row(draft, request, end):
        original(draft, request, end)
        draft.plan.samples[-1] = True

    monkeypatch.setattr(planner, "append_row", append_row)


def the_first_request_is_preempted_instead_of_the_last(monkeypatch):
    monkeypatch.setattr(lifecycle, "_order", lambda request: tuple(-key for key in request.order))


def a_request_that_was_passed_is_forgotten(monkeypatch):
    original = RequestQueue.put_back

    def put_back(self, request):
        if not request.num_bypasses:
            original(self, request)

    monkeypatch.setattr(RequestQueue, "put_back", put_back)


def _with_limits(monkeypatch, **changes):
    original = scheduler.step_limits

    def step_limits(config, constraints):
        limits = original(config, constraints)
        return replace(limits, **{name: change(getattr(limits, name)) for name, change in changes.items()})

    monkeypatch.setattr(scheduler, "step_limits", step_limits)


def the_token_budget_is_exceeded(monkeypatch):
    _with_limits(monkeypatch, max_tokens=lambda n: n + 3)


def one_request_too_many_runs(monkeypatch):
    _with_limits(monkeypatch, max_requests=lambda n: n + 1)


def alignment_is_ignored(monkeypatch):
    _with_limits(monkeypatch, token_alignment=lambda n: 1)


def prompts_are_not_separated(monkeypatch):
    _with_limits(monkeypatch, separate_prefill=lambda wanted: False)


def any_number_of_prompts_is_computed_in_part(monkeypatch):
    _with_limits(monkeypatch, max_partial_prefills=lambda n: 99)


def deadlines_are_not_watched(monkeypatch):
    monkeypatch.setattr(Deadlines, "pop_passed", lambda self, now_s: [])


def requests_end_before_their_deadline(monkeypatch):
    original = Deadlines.pop_passed
    monkeypatch.setattr(Deadlines, "pop_passed", lambda self, now_s: original(self, now_s + 0.1))


def stale_result_applied(monkeypatch):
    original = TokenBudgetScheduler.update
    monkeypatch.setattr(
        TokenBudgetScheduler,
        "update",
        lambda self, plan, result: original(self, plan, replace(result, step=plan.step)),
    )


def result_applied_twice(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        in_flight = self._requests.in_flight
        if result.step == plan.step and plan.step not in in_flight:
            in_flight.appendleft(plan.step)
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def what_a_faulty_step_computed_is_found(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        for request_id, num_tokens in zip(plan.request_ids, plan.num_tokens, strict=True):
            request = self._requests.requests.get(request_id)
            if request_id in result.faults and request and request.block_ids:
                request.num_computed_tokens += num_tokens
                self._blocks.commit(request)
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def a_fault_of_one_request_ends_all(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        if result.faults:
            result.faults.update(dict.fromkeys(plan.request_ids, "another one failed"))
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def _with_request(monkeypatch, name, change):
    original = TokenBudgetScheduler._append_tokens

    def append_tokens(self, request, sampled):
        value = getattr(request, name)
        setattr(request, name, change(value))
        try:
            return original(self, request, sampled)
        finally:
            setattr(request, name, value)

    monkeypatch.setattr(TokenBudgetScheduler, "_append_tokens", append_tokens)


def stop_tokens_are_ignored(monkeypatch):
    _with_request(monkeypatch, "stop_ids", lambda ids: frozenset())


def one_token_too_many_is_generated(monkeypatch):
    _with_request(monkeypatch, "max_total_tokens", lambda n: n + 1)


def results_are_applied_in_any_order(monkeypatch):
    original = TokenBudgetScheduler._is_due

    def is_due(self, plan, result):
        self._requests.in_flight = type(self._requests.in_flight)(
            sorted(self._requests.in_flight, key=lambda step: step != plan.step)
        )
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "_is_due", is_due)


def blocks_are_returned_while_a_step_writes_to_them(monkeypatch):
    original = Lifecycle.end

    def end(self, request, reason):
        request.num_planned_tokens = request.num_computed_tokens
        original(self, request, reason)

    monkeypatch.setattr(Lifecycle, "end", end)


def blocks_held_for_a_step_are_never_returned(monkeypatch):
    monkeypatch.setattr(Lifecycle, "step_applied", lambda self, step: None)


def steps_under_way_are_forgotten_when_a_request_is_preempted(monkeypatch):
    original = planner.StepPlanner._make_room

    def make_room(self, draft, request, num_tokens):
        in_flight, self._requests.in_flight = self._requests.in_flight, ()
        try:
            return original(self, draft, request, num_tokens)
        finally:
            self._requests.in_flight = in_flight

    monkeypatch.setattr(planner.StepPlanner, "_make_room", make_room)


def tokens_that_steps_under_way_sample_are_not_counted(monkeypatch):
    original = planner.append_single_rows

    def append_single_rows(plan, requests):
        original(plan, requests)
        for request in requests:
            request.num_pending_tokens = 0

    monkeypatch.setattr(planner, "append_single_rows", append_single_rows)


def refused_guesses_count_as_computed(monkeypatch):
    original = TokenBudgetScheduler._accept

    def accept(self, request, num_tokens, sampled):
        refused = num_tokens - len(sampled)
        new = original(self, request, num_tokens, sampled)
        if refused and not request.finished:
            request.num_computed_tokens = request.num_planned_tokens = len(request.token_ids)
        return new

    monkeypatch.setattr(TokenBudgetScheduler, "_accept", accept)


def a_state_after_refused_guesses_is_taken(monkeypatch):
    monkeypatch.setattr(PagedBlockManager, "drafts_are_atomic", property(lambda self: False))


def spare_states_are_never_returned(monkeypatch):
    monkeypatch.setattr(DraftSlots, "drop", lambda self, request: None)


def blocks_of_refused_guesses_are_kept(monkeypatch):
    monkeypatch.setattr(DraftSlots, "trim", lambda self, request: None)


def guesses_follow_an_unknown_token(monkeypatch):
    original = planner.StepPlanner._guess

    def guess(self, draft, request, max_tokens):
        pending, request.num_pending_tokens = request.num_pending_tokens, 0
        try:
            return original(self, draft, request, max_tokens)
        finally:
            request.num_pending_tokens = pending

    monkeypatch.setattr(planner.StepPlanner, "_guess", guess)


def too_many_guesses_are_planned(monkeypatch):
    _with_limits(monkeypatch, max_draft_tokens=lambda n: n + 1 if n else n)


def loaded_blocks_are_shared_before_they_are_known_to_be_right(monkeypatch):
    monkeypatch.setattr(LoadLedger, "__contains__", lambda self, request: False)


def requests_on_lost_copies_go_on(monkeypatch):
    original = PagedBlockManager.forget_lost

    def forget_lost(self, handles):
        original(self, handles)
        return []

    monkeypatch.setattr(PagedBlockManager, "forget_lost", forget_lost)


def blocks_are_loaded_before_others_are_saved(monkeypatch):
    original = simulation_runner.carry_out

    def carry_out(transfers, store, memory):
        saves, transfers.saves = transfers.saves, []
        known = [load for load in transfers.loads if load.handle not in {save.handle for save in saves}]
        late, transfers.loads = [load for load in transfers.loads if load not in known], known
        lost = original(transfers, store, memory)
        return lost + original(Transfers(saves=saves, loads=late), store, memory)

    monkeypatch.setattr(simulation_runner, "carry_out", carry_out)


def blocks_are_saved_after_they_were_written_again(monkeypatch):
    original = SimulatedRunner.submit

    def submit(self, step):
        transfers, step.transfers = step.transfers, None
        result = original(self, step).result()
        if transfers:
            result.lost += simulation_runner.carry_out(transfers, self._store, self)
        return CompletedStep(result)

    monkeypatch.setattr(SimulatedRunner, "submit", submit)


def copies_of_aborted_requests_are_kept(monkeypatch):
    monkeypatch.setattr(SwapSpace, "release", lambda self, request: None)


def the_last_block_is_not_swapped_out(monkeypatch):
    original = SwapSpace._needed
    monkeypatch.setattr(SwapSpace, "_needed", lambda self, request: [*original(self, request)][:-1])


def copies_are_never_demoted(monkeypatch):
    original = TierIndex.take

    def take(self):
        transfers = original(self)
        if transfers:
            transfers.demotions = []
        return transfers

    monkeypatch.setattr(TierIndex, "take", take)


def dropped_copies_are_still_found(monkeypatch):
    original = TierIndex.take

    def take(self):
        transfers = original(self)
        if transfers and transfers.loads:
            transfers.drops = [load.handle for load in transfers.loads]
        return transfers

    monkeypatch.setattr(TierIndex, "take", take)


def encoder_blocks_are_counted_in_tokens_of_the_sequence(monkeypatch):
    monkeypatch.setattr(CrossAttentionSpec, "held_tokens", lambda self, num_tokens, num_encoder_tokens: num_tokens)


def encoder_blocks_are_shared_without_being_found(monkeypatch):
    original = PrefixFinder.find

    def find(self, request, max_tokens):
        prefix = original(self, request, max_tokens)
        for group in self._encoded_groups:
            cached = [*self._pools[group].references()][: len(prefix.block_ids[group])]
            prefix.block_ids[group][: len(cached)] = cached
        return prefix

    monkeypatch.setattr(PrefixFinder, "find", find)


def nonsense_stays_findable(monkeypatch):
    monkeypatch.setattr(PagedBlockManager, "quarantine", lambda self, request: None)


def samples_share_the_prompt_of_a_faulty_sibling(monkeypatch):
    def holds_prompt(request):
        return bool(request.block_ids) and request.num_computed_tokens >= request.num_prompt_tokens

    monkeypatch.setattr(admission, "_holds_prompt", holds_prompt)


def any_request_of_a_step_that_raised_is_blamed(monkeypatch):
    original = Trials.blame
    monkeypatch.setattr(Trials, "blame", lambda self, ends, *, alone: original(self, ends, alone=True))


def requests_keep_their_place_when_a_step_raises(monkeypatch):
    original = TokenBudgetScheduler.abandon

    def abandon(self, plans, error):
        started_over = Lifecycle.start_over
        Lifecycle.start_over = lambda requests, request: None
        try:
            return original(self, plans, error)
        finally:
            Lifecycle.start_over = started_over

    monkeypatch.setattr(TokenBudgetScheduler, "abandon", abandon)


def room_that_a_plan_that_raised_should_make_is_forgotten(monkeypatch):
    monkeypatch.setattr(scheduler, "_room_made", lambda plans: None)


BUGS = [
    value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and not name.startswith("_")
]


def test_there_are_enough_bugs():
    assert len(BUGS) >= 25


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(SimulationFailure, match="zif simulate --seed") as caught:
        run_scenarios(Campaign(seed=0, num_steps=MAX_STEPS))
    assert not isinstance(caught.value.__cause__, TypeError | AttributeError | NameError), "the patch itself is broken"
