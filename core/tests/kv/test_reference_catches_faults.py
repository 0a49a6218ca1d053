"""Faults planted in the block manager: the reference model must see each of them, without the manager's own checks.

Each fault is a mistake that somebody could make, planted through public methods only. A fault that the model does not
see would pass for working code, so this is the test of the model.
"""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kv.block_manager_machine import ARENAS, MAX_STEP_TOKENS, SETTINGS, BlockManagerMachine
from kv.reference_model import Disagreement
from zif.contract import (
    CacheKey,
    ChunkedLocalSpec,
    KVSpec,
    PrefixMiss,
    RecurrentStateSpec,
    SamplingParams,
    SlidingWindowSpec,
)
from zif.kv import PagedBlockManager

pytestmark = pytest.mark.slow


class Manager(PagedBlockManager):
    """The real manager, remembering who holds blocks."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.holders = []

    def begin(self, request, source=None):
        super().begin(request, source)
        self.holders.append(request)

    def release(self, request):
        super().release(request)
        if request in self.holders:
            self.holders.remove(request)


class ReleaseLeaks(Manager):
    def release(self, request):
        request.block_ids, request.capacity = (), 0


class PreemptionLeaks(Manager):
    def suspend(self, request):
        request.block_ids, request.capacity = (), 0


class SharedBlocksAreFreedTwice(Manager):
    def release(self, request):
        tables = request.block_ids
        super().release(request)
        hands = [Counter(b for other in self.holders for b in other.block_ids[g]) for g in range(len(tables))]
        request.block_ids = tuple([b * (held[b] == 1) for b in t] for t, held in zip(tables, hands, strict=True))
        if any(map(any, request.block_ids)):
            super().release(request)
        request.block_ids = ()


class BlockIsGivenTwice(Manager):
    def reserve(self, request, num_tokens):
        done = super().reserve(request, num_tokens)
        other = next((r for r in self.holders if r is not request and r.block_ids[0] and r.block_ids[0][-1]), None)
        if done and other:
            request.block_ids[0][-1] = other.block_ids[0][-1]
        return done


class ReserveGivesABlockTooFew(Manager):
    def reserve(self, request, num_tokens):
        done = super().reserve(request, max(1, num_tokens - 1))
        request.capacity += done
        return done


class ReserveGivesABlockTooMany(Manager):
    def reserve(self, request, num_tokens):
        return super().reserve(request, num_tokens + 1)


class RefusedReservationKeepsBlocks(Manager):
    def reserve(self, request, num_tokens):
        return super().reserve(request, num_tokens) or super().reserve(request, num_tokens - 4) > 1


class ReserveRefusesTheLastBlock(Manager):
    def reserve(self, request, num_tokens):
        return super().reserve(request, num_tokens + 4) and super().reserve(request, num_tokens)


class ReserveTouchesAnotherRequest(Manager):
    def reserve(self, request, num_tokens):
        done = super().reserve(request, num_tokens)
        if not done and self.holders[0] is not request:
            super().release(other := self.holders[0])
            super().begin(other)
        return done


class SiblingSharesTheUnfinishedBlock(Manager):
    """One block of the source is taken over that the source itself still writes to, or wrote its output to."""

    def begin(self, request, source=None):
        known, prompt = request.token_ids, request.num_prompt_tokens
        if source is not None:
            request.token_ids, request.num_prompt_tokens = known + [0] * 4, prompt + 4
        super().begin(request, source)
        request.token_ids, request.num_prompt_tokens = known, prompt


class SaltIsIgnored(Manager):
    """One tenant finds the prefixes of another."""

    def begin(self, request, source=None):
        key, request.cache_key = request.cache_key, CacheKey()
        super().begin(request, source)
        request.cache_key = key

    def commit(self, request):
        key, request.cache_key = request.cache_key, CacheKey()
        super().commit(request)
        request.cache_key = key


class IndexedBeforeComputed(Manager):
    def reserve(self, request, num_tokens):
        done, computed = super().reserve(request, num_tokens), request.num_computed_tokens
        if done:
            request.num_computed_tokens = num_tokens
            super().commit(request)
            request.num_computed_tokens = computed
        return done


class CommitDoesNothing(Manager):
    def commit(self, request):
        pass


class FoundPrefixIsTooShort(Manager):
    def begin(self, request, source=None):
        known = request.token_ids
        if len(known) > 12:
            request.token_ids = known[:-4]
        super().begin(request, source)
        request.token_ids, report = known, request.prefix
        limit = (len(known) - 1) // self.unit * self.unit
        request.prefix = replace(report, max_tokens=limit, miss=report.miss or PrefixMiss.NOT_SEEN)
        if report.num_tokens == limit:
            request.prefix = report

    unit = 4


class FoundPrefixIsATokenTooLong(Manager):
    def begin(self, request, source=None):
        super().begin(request, source)
        if 0 < request.num_computed_tokens < request.num_tokens - 1:
            request.num_computed_tokens += 1
            request.capacity += 1


class PromptLogprobsReuse(Manager):
    def begin(self, request, source=None):
        sampling, request.sampling = request.sampling, SamplingParams()
        super().begin(request, source)
        request.sampling = sampling


class CachingIsNeverOff(Manager):
    def __init__(self, arena, *, enable_prefix_caching, max_step_tokens):
        super().__init__(arena, enable_prefix_caching=True, max_step_tokens=max_step_tokens)


class ResetForgetsNothing(Manager):
    def reset_prefix_cache(self):
        pass


class MissIsAlwaysNotSeen(Manager):
    def begin(self, request, source=None):
        super().begin(request, source)
        if request.prefix.miss in (PrefixMiss.NO_CHECKPOINT, PrefixMiss.EVICTED):
            request.prefix = replace(request.prefix, miss=PrefixMiss.NOT_SEEN)


class MissIsAlwaysEvicted(Manager):
    def begin(self, request, source=None):
        super().begin(request, source)
        if request.prefix.miss is PrefixMiss.NOT_SEEN:
            request.prefix = replace(request.prefix, miss=PrefixMiss.EVICTED)


class MissBlamesAGroupWithoutStates(Manager):
    def begin(self, request, source=None):
        super().begin(request, source)
        request.prefix = replace(request.prefix, kind="full")


class ReportOfFirstAdmissionIsReplaced(Manager):
    def begin(self, request, source=None):
        super().begin(request, source)
        request.prefix = replace(request.prefix, num_tokens=request.num_computed_tokens)


class CensusCountsABlockTwice(Manager):
    def usage(self):
        return tuple(replace(count, num_free=count.num_free + count.num_cached) for count in super().usage())


class StepPassesCheckpoints(Manager):
    def step_end(self, request, num_tokens):
        return num_tokens


class StepEndsAnywhere(Manager):
    def step_end(self, request, num_tokens):
        return max(request.num_planned_tokens + 1, num_tokens - 1)


class CanHoldIsHopeful(Manager):
    def can_hold(self, request, num_tokens):
        return True


class CanHoldIsTimid(Manager):
    def can_hold(self, request, num_tokens):
        return super().can_hold(request, num_tokens + 4)


class FitsIsHopeful(Manager):
    def fits(self, num_tokens):
        return super().fits(max(1, num_tokens - 4))


class FitsIsTimid(Manager):
    def fits(self, num_tokens):
        return super().fits(num_tokens + 4)


def window_moves_on_too_early(monkeypatch):
    original = SlidingWindowSpec.first_needed_token
    monkeypatch.setattr(SlidingWindowSpec, "first_needed_token", lambda self, computed: original(self, computed + 1))


def window_moves_on_too_late(monkeypatch):
    original = SlidingWindowSpec.first_needed_token
    late = lambda self, computed: original(self, max(0, computed - 1))  # noqa: E731
    monkeypatch.setattr(SlidingWindowSpec, "first_needed_token", late)


def chunk_ends_too_early(monkeypatch):
    original = ChunkedLocalSpec.first_needed_token
    monkeypatch.setattr(ChunkedLocalSpec, "first_needed_token", lambda self, computed: original(self, computed + 1))


def state_goes_back_before_it_is_read(monkeypatch):
    monkeypatch.setattr(RecurrentStateSpec, "first_needed_token", lambda self, computed: computed)


def state_is_found_at_lengths_it_was_not_left_at(monkeypatch):
    monkeypatch.setattr(RecurrentStateSpec, "reusable_blocks", KVSpec.reusable_blocks)


def state_is_written_over_its_checkpoint(monkeypatch):
    """A step that begins at a block's end goes on in the checkpoint's own block."""
    first = lambda self, num_held, num_tokens: max(num_held, self.num_blocks(num_tokens))  # noqa: E731
    monkeypatch.setattr(RecurrentStateSpec, "first_written_block", first)


FAULTY_MANAGERS = [
    (ReleaseLeaks, "full"),
    (PreemptionLeaks, "tight"),
    (SharedBlocksAreFreedTwice, "full"),
    (BlockIsGivenTwice, "full"),
    (ReserveGivesABlockTooFew, "full"),
    (ReserveGivesABlockTooMany, "full"),
    (RefusedReservationKeepsBlocks, "tight"),
    (ReserveRefusesTheLastBlock, "full"),
    (ReserveTouchesAnotherRequest, "full"),
    (SiblingSharesTheUnfinishedBlock, "full"),
    (SaltIsIgnored, "roomy"),
    (IndexedBeforeComputed, "full"),
    (CommitDoesNothing, "window"),
    (CommitDoesNothing, "roomy"),
    (FoundPrefixIsTooShort, "roomy"),
    (FoundPrefixIsATokenTooLong, "full"),
    (PromptLogprobsReuse, "full"),
    (CachingIsNeverOff, "full"),
    (ResetForgetsNothing, "full"),
    (MissIsAlwaysNotSeen, "roomy"),
    (MissIsAlwaysEvicted, "roomy"),
    (MissBlamesAGroupWithoutStates, "state"),
    (ReportOfFirstAdmissionIsReplaced, "full"),
    (CensusCountsABlockTwice, "tight"),
    (StepPassesCheckpoints, "state"),
    (StepEndsAnywhere, "full"),
    (CanHoldIsHopeful, "full"),
    (CanHoldIsTimid, "full"),
    (FitsIsHopeful, "full"),
    (FitsIsTimid, "full"),
]
FAULTY_KINDS = [
    (window_moves_on_too_early, "window"),
    (window_moves_on_too_late, "window"),
    (chunk_ends_too_early, "window"),
    (state_goes_back_before_it_is_read, "state"),
    (state_is_found_at_lengths_it_was_not_left_at, "state"),
    (state_is_written_over_its_checkpoint, "state"),
]


def must_be_caught(family, manager_class):
    class Machine(BlockManagerMachine):
        arenas = ARENAS[family]
        checks_integrity = False

        def manager_of(self, arena, caching):
            return manager_class(arena, enable_prefix_caching=caching, max_step_tokens=MAX_STEP_TOKENS)

        def teardown(self):
            """Leave a manager alone whose books are wrong."""

    with pytest.raises(Disagreement):
        run_state_machine_as_test(Machine, settings=settings(SETTINGS, phases=[Phase.generate], max_examples=2000))


@pytest.mark.parametrize(("fault", "family"), FAULTY_MANAGERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_faulty_manager_is_caught(fault, family):
    must_be_caught(family, fault)


@pytest.mark.parametrize(("fault", "family"), FAULTY_KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_faulty_kind_is_caught(fault, family, monkeypatch):
    fault(monkeypatch)
    must_be_caught(family, PagedBlockManager)
