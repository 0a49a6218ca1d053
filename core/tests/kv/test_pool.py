"""The states of a block: free, cached, owned; eviction order; the index."""

import pytest

from support.control_plane import cut, full
from zif.contract import KVUsage
from zif.kv.pool import BlockPool
from zif.kv.slabs import SlabLender


@pytest.fixture
def pool():
    return BlockPool(SlabLender(cut((full(),), num_slabs=4)), group=0)


def cache(pool, block, name):
    """Index an owned block and let go of it."""
    pool.index(block, name, name * 2)
    pool.release(block)


def test_every_block_is_handed_out_once_and_never_the_null_block(pool):
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    pool.check_integrity()


def test_a_refused_allocation_takes_nothing(pool):
    assert pool.allocate(5) is None
    assert len(pool.allocate(4)) == 4


def test_a_block_is_free_again_when_the_last_hand_lets_go(pool):
    (block,) = pool.allocate(1)
    pool.share(block)
    pool.release(block)
    assert pool.usage() == KVUsage(0, 0, 1, 3)
    pool.release(block)
    assert pool.usage() == KVUsage(1, 0, 0, 3)


def test_releasing_more_often_than_held_is_an_invariant_fault(pool):
    (block,) = pool.allocate(1)
    pool.release(block)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block)


def test_an_indexed_block_stays_findable_until_it_is_reused(pool):
    (block,) = pool.allocate(1)
    cache(pool, block, b"a")
    assert pool.usage() == KVUsage(0, 1, 0, 3)
    assert pool.find(b"a", b"aa") == block
    pool.allocate(4)
    assert pool.find(b"a", b"aa") is None


def test_the_least_recently_released_block_is_evicted_first(pool):
    blocks = pool.allocate(4)
    for block, name in zip(blocks, (b"a", b"b", b"c", b"d"), strict=True):
        cache(pool, block, name)
    pool.share(blocks[0])
    pool.release(blocks[0])
    assert pool.allocate(2) is not None
    assert [pool.find(name, name * 2) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, False, True]


def test_idle_memory_is_used_before_a_cached_block(pool):
    (block,) = pool.allocate(1)
    cache(pool, block, b"a")
    pool.allocate(3)
    assert pool.find(b"a", b"aa") == block


def test_equal_digests_of_other_content_do_not_match(pool):
    (block,) = pool.allocate(1)
    pool.index(block, b"same", b"content")
    assert pool.find(b"same", b"other") is None
    assert pool.find(b"same", b"content") == block


def test_the_first_block_with_a_digest_keeps_it(pool):
    first, second = pool.allocate(2)
    pool.index(first, b"d", b"content")
    pool.index(second, b"d", b"content")
    pool.release(second)
    assert pool.find(b"d", b"content") == first
    assert pool.usage() == KVUsage(1, 0, 1, 2)


def test_forgetting_frees_cached_blocks_and_leaves_owned_ones(pool):
    owned, cached = pool.allocate(2)
    pool.index(owned, b"o", b"oo")
    cache(pool, cached, b"c")
    pool.forget_all()
    pool.check_integrity()
    assert (pool.find(b"o", b"oo"), pool.find(b"c", b"cc")) == (None, None)
    assert pool.usage() == KVUsage(0, 0, 1, 3)
    pool.release(owned)
    assert pool.usage() == KVUsage(1, 0, 0, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.clear(),
        lambda pool: pool._cached.update({pool.allocate(1)[0]: None}),
        lambda pool: pool._block_of.update({b"x": 1}),
        lambda pool: pool._owned_in_slab.update({next(iter(pool._owned_in_slab)): 1}),
        lambda pool: pool._used_in_slab.update({next(iter(pool._used_in_slab)): 1}),
        lambda pool: pool._idle_slabs.clear(),
        lambda pool: setattr(pool, "_num_owned", 7),
    ],
    ids=["lost", "two states", "index", "owned in slab", "used in slab", "idle", "census"],
)
def test_the_integrity_check_sees_damage(pool, damage):
    for block in pool.allocate(2):
        pool.release(block)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()
