"""The control plane under random traffic, and planted bugs to prove that the simulation would notice.

Seeds are fixed, so that a failure repeats.
"""

from dataclasses import replace

import pytest

from support.control_plane import Engine, cut, expected_output, full, new_request, sliding
from support.simulation import Simulation
from zif.contract import RequestStatus, SlidingWindowSpec
from zif.errors import ZifError
from zif.kv import hashing, manager
from zif.kv.manager import PagedBlockManager
from zif.kv.pool import BlockPool
from zif.kv.prefix import PrefixFinder
from zif.null.runner import NullRunner
from zif.scheduling import scheduler
from zif.scheduling.scheduler import TokenBudgetScheduler

SEEDS = range(40)
FEW_SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_traffic_gives_the_text_of_the_oracle(seed):
    assert Simulation(seed).run().num_steps > 0


def test_the_traffic_meets_hits_preemptions_and_aborts():
    totals = [Simulation(seed).run() for seed in FEW_SEEDS]
    assert sum(t.num_cached_tokens for t in totals) > 500
    assert sum(t.num_preemptions for t in totals) > 10
    assert sum(t.num_aborts for t in totals) > 20


class TestOracle:
    def test_the_next_token_depends_on_every_visible_token_and_its_place(self):
        specs, tokens = (sliding(3),), [1, 2, 3, 4, 5]
        base = _next(tokens, specs)
        assert _next([9, 2, 3, 4, 5], specs) == base, "behind the window"
        assert (
            len({base, _next([1, 2, 9, 4, 5], specs), _next([1, 2, 4, 3, 5], specs), _next([2, 3, 4, 5], specs)}) == 4
        )
        assert _next([9, 2, 3, 4, 5], (full(),)) != _next(tokens, (full(),))

    def test_every_group_counts(self):
        assert _next([1, 2, 3], (full(), sliding(2))) != _next([1, 2, 3], (full(), sliding(1)))


def _next(tokens, specs):
    request = new_request(0, tokens)
    request.token_ids.append(0)
    return expected_output(request, specs)[0]


class TestRunner:
    def test_a_request_cannot_start_twice(self):
        stack = Engine(cut((full(),), 8))
        stack.add(new_request(0, [1, 2]))
        plan = stack.scheduler.schedule()
        stack.runner.submit(plan)
        with pytest.raises(AssertionError, match="started twice"):
            stack.runner.submit(plan)

    def test_blocks_must_follow_each_other(self):
        stack = Engine(cut((full(),), 8))
        stack.add(new_request(0, [1, 2, 3, 4]))
        stack.step()
        plan = stack.scheduler.schedule()
        plan.block_updates = [replace(update, start=2) for update in plan.block_updates]
        with pytest.raises(AssertionError, match="do not follow"):
            stack.runner.submit(plan)

    def test_closing_twice_is_closing_once(self):
        stack = Engine(cut((full(),), 8))
        stack.runner.close()
        stack.runner.close()

    def test_a_row_that_writes_into_anothers_block_changes_the_text_of_that_very_step(self):
        stack = Engine(cut((full(),), 8))
        first, second = new_request(0, [1, 2]), new_request(1, [3, 4])
        stack.add(first, second)
        plan = stack.scheduler.schedule()
        plan.started[1].block_ids[0][0] = plan.started[0].block_ids[0][0]
        result = stack.runner.submit(plan).result()
        assert result.sampled[0] != [_next([1, 2], (full(),))]


def window_off_by_one(monkeypatch):
    monkeypatch.setattr(
        SlidingWindowSpec, "first_needed_block", lambda self, n: max(0, n - self.window + 2) // self.block_size
    )


def preemption_leaks_blocks(monkeypatch):
    original = PagedBlockManager.release

    def release(self, request):
        if request.status is RequestStatus.PREEMPTED or request.num_preemptions:
            request.block_ids, request.capacity = (), 0
        else:
            original(self, request)

    monkeypatch.setattr(PagedBlockManager, "release", release)


def abort_of_a_preempted_request_leaves_it_waiting(monkeypatch):
    monkeypatch.setattr(scheduler.RequestQueue, "discard", lambda self, request: None)


def hit_across_salts(monkeypatch):
    original = hashing.root_content
    monkeypatch.setattr(hashing, "root_content", lambda key, size: original(replace(key, salt=""), size))


def blocks_named_by_their_own_tokens_only(monkeypatch):
    content = hashing.PrefixChain.content
    monkeypatch.setattr(
        hashing.PrefixChain, "content", lambda self, block: content(self, block)[-4 * self._block_size :]
    )


def last_block_released_twice(monkeypatch):
    original = PagedBlockManager.release

    def release(self, request):
        held = [blocks[-1:] for blocks in request.block_ids]
        original(self, request)
        for pool, blocks in zip(self._pools, held, strict=False):
            manager._release_all(pool, blocks)

    monkeypatch.setattr(PagedBlockManager, "release", release)


def one_null_entry_too_many(monkeypatch):
    original = PrefixFinder.find

    def indexed_prefix(self, request, limit):
        prefix = original(self, request, limit)
        for blocks in prefix.block_ids:
            visible = [index for index, block in enumerate(blocks) if block]
            if visible:
                blocks[visible[0]] = 0
        return prefix

    monkeypatch.setattr(PrefixFinder, "find", indexed_prefix)


def sibling_shares_the_block_that_is_half_full(monkeypatch):
    original = PrefixFinder.of_source

    def shared_prefix(self, source, limit):
        prefix = original(self, source, limit)
        for blocks, held in zip(prefix.block_ids, source.block_ids, strict=True):
            blocks += [block for block in held[len(blocks) : len(blocks) + 1] if block and blocks]
        return prefix

    monkeypatch.setattr(PrefixFinder, "of_source", shared_prefix)


def blocks_indexed_before_they_are_computed(monkeypatch):
    original = PagedBlockManager.reserve

    def reserve(self, request, num_tokens):
        done = original(self, request, num_tokens)
        computed = request.num_computed_tokens
        request.num_computed_tokens = min(request.num_tokens, request.capacity)
        for group in range(len(self._pools)):
            if self._caching and done:
                self._index_new_blocks(request, group)
        request.num_computed_tokens = computed
        return done

    monkeypatch.setattr(PagedBlockManager, "reserve", reserve)


def sharing_does_not_count(monkeypatch):
    original = BlockPool.share
    monkeypatch.setattr(
        BlockPool, "share", lambda self, block: None if self._references[block] else original(self, block)
    )


def evicted_blocks_stay_findable(monkeypatch):
    def evict(self, block):
        del self._cached[block]
        self._put_free(block)

    monkeypatch.setattr(BlockPool, "_evict", evict)


def slabs_with_owned_blocks_are_taken(monkeypatch):
    def surrender_slab(self, *, evict):
        slab = next(iter(self._slabs), None) if evict else None
        if slab is not None:
            self._slabs.pop(slab)
        return slab

    monkeypatch.setattr(BlockPool, "surrender_slab", surrender_slab)


def the_runner_is_not_told_of_released_requests(monkeypatch):
    original = NullRunner.submit
    monkeypatch.setattr(NullRunner, "submit", lambda self, step: original(self, replace(step, released=[])))


def chunks_ignore_the_budget(monkeypatch):
    original = TokenBudgetScheduler._admit
    monkeypatch.setattr(TokenBudgetScheduler, "_admit", lambda self, plan, budget: original(self, plan, budget + 3))


def the_last_token_is_found_too(monkeypatch):
    original = PagedBlockManager._longest_prefix

    def longest_prefix(self, request, source):
        request.token_ids.append(0)
        try:
            return original(self, request, source)
        finally:
            request.token_ids.pop()

    monkeypatch.setattr(PagedBlockManager, "_longest_prefix", longest_prefix)


BUGS = [
    window_off_by_one,
    preemption_leaks_blocks,
    abort_of_a_preempted_request_leaves_it_waiting,
    hit_across_salts,
    blocks_named_by_their_own_tokens_only,
    last_block_released_twice,
    one_null_entry_too_many,
    sibling_shares_the_block_that_is_half_full,
    blocks_indexed_before_they_are_computed,
    sharing_does_not_count,
    evicted_blocks_stay_findable,
    slabs_with_owned_blocks_are_taken,
    the_runner_is_not_told_of_released_requests,
    chunks_ignore_the_budget,
    the_last_token_is_found_too,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_noticed(monkeypatch, plant):
    plant(monkeypatch)
    assert any(_fails(seed) for seed in SEEDS), "the simulation cannot tell this bug from working code"


def _fails(seed):
    try:
        Simulation(seed).run()
    except (AssertionError, LookupError, ValueError, TypeError, ZifError):
        return True
    return False
