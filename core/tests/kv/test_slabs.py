"""Slabs move between layer groups: idle ones first, cached blocks last, owned blocks never."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.control_plane import cut, full, new_request, sliding
from zif.contract import KVUsage
from zif.kv import PagedBlockManager
from zif.kv.hashing import digest_of
from zif.kv.pool import BlockPool
from zif.kv.retention import Keep
from zif.kv.slabs import SlabLender

SMALL, LARGE = full(2), full(4)


def pools(num_slabs, slab_words=8):
    lender = SlabLender(cut((SMALL, LARGE), num_slabs, slab_words))
    return lender, BlockPool(lender, 0), BlockPool(lender, 1)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(7, 40))
def test_every_slab_offers_the_blocks_that_the_arena_promises_and_no_two_overlap(first, second, slab_words):
    arena = cut((full(first), full(second)), 9, slab_words)
    for group, spec in enumerate((full(first), full(second))):
        seen = set()
        for slab in range(arena.num_slabs):
            blocks = arena.slab_blocks(group, slab)
            words = [w for b in blocks for w in range(b * spec.block_size, (b + 1) * spec.block_size)]
            assert all(slab * slab_words <= w < (slab + 1) * slab_words for w in words)
            assert len(blocks) >= arena.min_slab_blocks(group)
            assert seen.isdisjoint(blocks)
            seen.update(blocks)
        assert max(seen) < arena.num_cells(group)


def test_a_group_borrows_slab_by_slab():
    lender, small, large = pools(num_slabs=3)
    assert len(small.allocate(1)) == 1
    assert lender.num_free == 2
    assert small.usage() == KVUsage(num_free=3, num_cached=0, num_owned=1, num_lendable=8)
    large.allocate(3)
    assert lender.num_free == 0


def test_an_idle_slab_is_surrendered_and_cached_blocks_survive():
    _, small, large = pools(num_slabs=2)
    cached, *rest = small.allocate(5)
    small.index(cached, b"d", b"content")
    for block in (cached, *rest):
        small.release(block)
    assert len(large.allocate(2)) == 2
    small.check_integrity()
    assert small.find(b"d", b"content") == cached


def test_own_cached_blocks_go_before_those_of_another_group():
    _, small, large = pools(num_slabs=2)
    blocks, mine = small.allocate(4), large.allocate(2)
    small.index(blocks[0], b"s", b"small")
    large.index(mine[0], b"l", b"large")
    for pool, held in ((small, blocks), (large, mine)):
        for block in held:
            pool.release(block)
    large.allocate(2)
    assert small.find(b"s", b"small") is not None
    assert large.find(b"l", b"large") is None


def test_another_groups_cached_blocks_are_evicted_when_nothing_else_is_left():
    _, small, large = pools(num_slabs=1)
    blocks = small.allocate(4)
    for index, block in enumerate(blocks):
        small.index(block, digest_of(bytes([index])), b"content")
        small.release(block)
    assert len(large.allocate(2)) == 2
    assert small.usage() == KVUsage(0, 0, 0, 0)
    assert small.find(digest_of(bytes([0])), b"content") is None


def test_the_least_recently_used_slab_is_surrendered():
    _, small, large = pools(num_slabs=2)
    old, new = small.allocate(4), small.allocate(4)
    for name, block in enumerate([*new, *old]):
        small.index(block, digest_of(bytes([name])), b"content")
        small.release(block)
    large.allocate(1)
    assert small.find(digest_of(bytes([0])), b"content") is None, "the four released first stood in this slab"
    assert small.find(digest_of(bytes([4])), b"content") == old[0]


def test_a_slab_with_an_owned_block_is_never_taken():
    _, small, large = pools(num_slabs=1)
    owned, *rest = small.allocate(4)
    for block in rest:
        small.release(block)
    assert large.allocate(1) is None
    small.release(owned)
    assert large.allocate(1) is not None


def test_blocks_of_a_surrendered_slab_are_told_before_they_go():
    lender, told = SlabLender(cut((SMALL, LARGE), 1, 8)), []
    small = BlockPool(lender, 0, on_evict=lambda block, digest: told.append((block, digest)))
    large = BlockPool(lender, 1)
    blocks = small.allocate(4)
    for block in blocks[:2]:
        small.index(block, digest_of(bytes([block])), bytes([block]))
    for block in blocks:
        small.release(block)
    assert large.allocate(1) is not None
    assert sorted(told) == sorted((block, digest_of(bytes([block]))) for block in blocks[:2])


def test_the_slab_of_the_lowest_priority_is_surrendered():
    _, small, large = pools(num_slabs=2)
    first, second = small.allocate(4), small.allocate(4)
    for block in [*first, *second]:
        small.index(block, digest_of(bytes([block])), bytes([block]), Keep(90 if block in first else 50))
        small.release(block)
    large.allocate(1)
    assert [small.find(digest_of(bytes([b])), bytes([b])) is None for b in (first[0], second[0])] == [False, True]


@given(st.data(), st.integers(7, 19))
@settings(max_examples=60, deadline=None)
def test_groups_of_odd_sizes_borrow_and_surrender_without_losing_a_block(data, slab_words):
    lender = SlabLender(cut((full(3), full(7)), 6, slab_words))
    both = [BlockPool(lender, group) for group in (0, 1)]
    hands = []
    for number in range(data.draw(st.integers(1, 40))):
        group = data.draw(st.integers(0, 1))
        blocks = both[group].allocate(data.draw(st.integers(0, 4))) or []
        for block in blocks:
            both[group].index(block, digest_of(bytes([number, block])), bytes([number, block]))
        hands += [(group, block) for block in blocks]
        for _ in range(data.draw(st.integers(0, 4))):
            if hands:
                index, block = hands.pop(data.draw(st.integers(0, len(hands) - 1)))
                both[index].release(block)
        for pool in both:
            pool.check_integrity()
        lender.check_integrity([slab for pool in both for slab in pool.slabs])
        for pool, spare in ((pool, pool.num_own_available) for pool in both):
            assert 0 <= pool.num_spare_slabs(spare) <= len(pool.slabs)


def test_forgetting_gives_unowned_slabs_back_to_the_arena():
    lender, small, _ = pools(num_slabs=2)
    blocks = small.allocate(5)
    for block in blocks[1:]:
        small.index(block, digest_of(bytes([block])), b"content")
        small.release(block)
    small.forget_all()
    assert lender.num_free == 1
    small.check_integrity()
    lender.check_integrity([*small.slabs])


def test_the_integrity_check_sees_a_lost_and_a_doubly_lent_slab():
    lender, small, _ = pools(num_slabs=2)
    small.allocate(1)
    for lent in ([], [*small.slabs, *small.slabs]):
        with pytest.raises(AssertionError, match="slab"):
            lender.check_integrity(lent)


@given(st.lists(st.tuples(st.integers(1, 24), st.booleans()), min_size=1, max_size=8), st.integers(1, 40))
def test_a_lone_group_can_hold_exactly_what_it_can_reserve(others, num_tokens):
    manager = PagedBlockManager(cut((LARGE,), 10), enable_prefix_caching=True, max_step_tokens=64)
    for index, (length, keep) in enumerate(others):
        other = new_request(index, [index] * length)
        manager.begin(other)
        if manager.reserve(other, length):
            other.num_computed_tokens = length
            manager.commit(other)
        if not keep:
            manager.release(other)
    request = new_request(99, [50] * num_tokens)
    manager.begin(request)
    assert manager.can_hold(request, num_tokens) == manager.reserve(request, num_tokens)


def test_a_groups_own_unowned_slab_is_not_counted_again_as_one_to_borrow():
    """Each group has one unowned block and lacks one more; no slab is left to lend."""
    manager = PagedBlockManager(cut((full(4), sliding(1, 4)), 4), enable_prefix_caching=False, max_step_tokens=4)
    first, second, third = (new_request(index, [index] * 8) for index in range(3))
    for request in (first, second):
        manager.begin(request)
        assert manager.reserve(request, 4)
    manager.release(second)
    manager.begin(third)
    assert manager.can_hold(third, 4)
    assert not manager.can_hold(third, 8)
    assert not manager.reserve(third, 8)
