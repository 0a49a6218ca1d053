"""Bugs of the KV memory and of its copies on other tiers, planted as `planted_bugs` says: each is noticed."""

from dataclasses import replace

import pytest

from simulation.planted_bugs import assert_noticed, bugs_of
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
from zif.simulation import SimulatedRunner
from zif.simulation import runner as simulation_runner

pytestmark = pytest.mark.slow


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


def a_state_after_refused_guesses_is_taken(monkeypatch):
    monkeypatch.setattr(PagedBlockManager, "drafts_are_atomic", property(lambda self: False))


def spare_states_are_never_returned(monkeypatch):
    monkeypatch.setattr(DraftSlots, "drop", lambda self, request: None)


def blocks_of_refused_guesses_are_kept(monkeypatch):
    monkeypatch.setattr(DraftSlots, "trim", lambda self, request: None)


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


BUGS = bugs_of(globals())


def test_there_are_enough_bugs():
    assert len(BUGS) >= 25


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_noticed(monkeypatch, plant):
    assert_noticed(monkeypatch, plant)
