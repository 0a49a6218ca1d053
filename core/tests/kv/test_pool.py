"""The states of a block: free, cached, owned; the index; and everything at once against a simple model."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.control_plane import cut, full
from zif.contract import KVUsage
from zif.kv.hashing import digest_of
from zif.kv.pool import BlockPool
from zif.kv.retention import Keep
from zif.kv.slabs import SlabLender

DEFAULT_PRIORITY = 50


@pytest.fixture
def pool():
    return BlockPool(SlabLender(cut((full(),), num_slabs=4)), group=0)


def cache(pool, block, content, keep=None):
    """Index an owned block and let go of it."""
    assert pool.index(block, digest_of(content), content, keep or Keep())
    pool.release(block)


def found(pool, content):
    return pool.find(digest_of(content), content)


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
    assert found(pool, b"a") == block
    assert not pool.was_evicted(digest_of(b"a"))
    pool.allocate(4)
    assert found(pool, b"a") is None
    assert pool.was_evicted(digest_of(b"a"))


def test_the_least_recently_released_block_is_evicted_first(pool):
    blocks = pool.allocate(4)
    for block, content in zip(blocks, (b"a", b"b", b"c", b"d"), strict=True):
        cache(pool, block, content)
    pool.share(blocks[0])
    pool.release(blocks[0])
    assert pool.allocate(2) is not None
    assert [found(pool, content) is not None for content in (b"a", b"b", b"c", b"d")] == [True, False, False, True]


def test_idle_memory_is_used_before_a_cached_block(pool):
    (block,) = pool.allocate(1)
    cache(pool, block, b"a")
    pool.allocate(3)
    assert found(pool, b"a") == block


def test_equal_digests_of_other_content_do_not_match(pool):
    (block,) = pool.allocate(1)
    pool.index(block, b"same", b"content")
    assert pool.find(b"same", b"other") is None
    assert pool.find(b"same", b"content") == block


def test_the_first_block_with_a_digest_keeps_it(pool):
    first, second = pool.allocate(2)
    assert pool.index(first, b"d", b"content")
    assert not pool.index(second, b"d", b"content")
    assert not pool.index(second, b"d", b"other content")
    pool.release(second)
    assert pool.find(b"d", b"content") == first
    assert pool.usage() == KVUsage(1, 0, 1, 2)


def test_a_run_is_found_up_to_its_first_gap_or_other_content(pool):
    blocks = pool.allocate(3)
    contents = [b"a", b"b", b"c"]
    for block, content in zip(blocks, contents, strict=True):
        pool.index(block, digest_of(content), content)
    digests = [digest_of(content) for content in contents]
    assert pool.find_run(digests, contents) == blocks
    assert pool.find_run(digests, [b"a", b"x", b"c"]) == blocks[:1]
    assert pool.find_run([digests[0], digest_of(b"x"), digests[2]], [b"a", b"x", b"c"]) == blocks[:1]
    assert pool.find_run([digest_of(b"x")], [b"x"]) == []
    assert pool.find_run([], []) == []


def test_forgetting_frees_cached_blocks_and_leaves_owned_ones(pool):
    owned, cached = pool.allocate(2)
    pool.index(owned, digest_of(b"o"), b"o")
    cache(pool, cached, b"c")
    pool.forget_all()
    pool.check_integrity()
    assert (found(pool, b"o"), found(pool, b"c")) == (None, None)
    assert pool.usage() == KVUsage(0, 0, 1, 3)
    assert not pool.was_evicted(digest_of(b"c")), "its memory was not needed"
    pool.release(owned)
    assert pool.usage() == KVUsage(1, 0, 0, 3)


def _first_line(pool):
    return pool._order._default


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._lists.remove(2),
        lambda pool: pool._lists.append(pool._free, pool.allocate(1)[0]),
        lambda pool: setattr(pool, "_num_free", 7),
        lambda pool: setattr(pool, "_num_owned", 7),
        lambda pool: setattr(pool._order, "num_cached", 7),
        lambda pool: pool._references.__setitem__(3, 2),
        lambda pool: pool._lists.previous.__setitem__(3, 3),
        lambda pool: setattr(_first_line(pool), "num_blocks", 0),
        lambda pool: setattr(_first_line(pool), "queued", False),
        lambda pool: pool._index._table.__setitem__(0, 1),
        lambda pool: pool._index._keys.__setitem__(3, pool._index._keys[3] + 1),
        lambda pool: pool._index.contents.__setitem__(3, None),
        lambda pool: pool._index.contents.__setitem__(2, b"b"),
    ],
    ids=[
        "lost", "two states", "free", "owned", "cached", "owned and cached", "links", "line", "queue",
        "table", "key", "content", "free and findable",
    ],
)  # fmt: skip
def test_the_integrity_check_sees_damage(pool, damage):
    first, second, _ = blocks = pool.allocate(3)
    assert blocks == [3, 2, 1]
    cache(pool, first, b"a")
    pool.release(second)
    pool.check_integrity()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


class PoolModel(RuleBasedStateMachine):
    """A pool of one group against dictionaries: the same blocks are evicted in the same order, and told once each."""

    NUM_BLOCKS = 6

    @initialize(quotas=st.booleans())
    def start(self, quotas):
        self.now = 0.0
        self.told = []
        self.quotas = {"a": 29, "b": 0} if quotas else {}  # of 7 cells: 2 blocks and none
        self.pool = BlockPool(
            SlabLender(cut((full(),), self.NUM_BLOCKS)),
            0,
            clock=lambda: self.now,
            on_evict=lambda block, digest: self.told.append((block, digest)),
            quotas=self.quotas,
        )
        self.hands, self.content, self.wish, self.last_use, self.num_uses = {}, {}, {}, {}, 0

    def _priority(self, block):
        wish = self.wish[block]
        over = wish.expires_s is not None and wish.expires_s <= self.now
        return DEFAULT_PRIORITY if over else wish.priority

    def _cached(self, tenant=None):
        blocks = [b for b in self.content if b not in self.hands and tenant in (None, self.wish[b].tenant)]
        return sorted(blocks, key=lambda block: (self._priority(block), self.last_use[block]))

    def _evict(self, block):
        content = self.content.pop(block)
        return block, digest_of(content)

    @rule(count=st.integers(0, 3))
    def allocate(self, count):
        self.told.clear()
        spare = self.NUM_BLOCKS - len(self.hands) - len(self._cached())
        victims = self._cached()[: max(0, count - spare)]
        blocks = self.pool.allocate(count)
        fits = count <= spare + len(victims)
        assert (blocks is not None) == fits
        assert self.told == [self._evict(block) for block in victims]
        for block in blocks or []:
            assert block not in self.hands
            assert block not in self.content
            self.hands[block] = 1

    @rule(data=st.data())
    def share(self, data):
        known = sorted({*self.hands, *self.content})
        if known:
            block = data.draw(st.sampled_from(known))
            self.pool.share(block)
            self.hands[block] = self.hands.get(block, 0) + 1

    @rule(data=st.data())
    def release(self, data):
        if not self.hands:
            return
        self.told.clear()
        block = data.draw(st.sampled_from(sorted(self.hands)))
        self.pool.release(block)
        self.hands[block] -= 1
        victims = []
        if not self.hands[block]:
            del self.hands[block]
            self.num_uses += 1
            self.last_use[block] = self.num_uses
            tenant = self.wish[block].tenant if block in self.content else ""
            if tenant in self.quotas:
                surplus = len(self._cached(tenant)) - (self.NUM_BLOCKS + 1) * self.quotas[tenant] // 100
                victims = self._cached(tenant)[: max(0, surplus)]
        assert self.told == [self._evict(victim) for victim in victims]

    @rule(
        data=st.data(),
        content=st.sampled_from([bytes([number]) for number in range(9)]),
        priority=st.sampled_from([10, DEFAULT_PRIORITY, 90]),
        duration_s=st.sampled_from([None, None, 0.0, 1.5, 4.0]),
        tenant=st.sampled_from(["", "a", "b", "c"]),
    )
    def index(self, data, content, priority, duration_s, tenant):
        if self.hands:
            block = data.draw(st.sampled_from(sorted(self.hands)))
            keep = Keep(priority, None if duration_s is None else self.now + duration_s, tenant)
            added = self.pool.index(block, digest_of(content), content, keep)
            assert added == (content not in self.content.values() and block not in self.content)
            if added:
                self.content[block], self.wish[block] = content, keep

    @rule(data=st.data(), priority=st.sampled_from([10, 60, 90]), duration_s=st.sampled_from([None, 0.0, 3.0]))
    def retain(self, data, priority, duration_s):
        if not self.hands:
            return
        block = data.draw(st.sampled_from(sorted(self.hands)))
        keep = Keep(priority, None if duration_s is None else self.now + duration_s)
        self.pool.retain(block, keep)
        if block in self.content and duration_s != 0.0:
            now = replace(self.wish[block], priority=self._priority(block))
            if now.priority == DEFAULT_PRIORITY:
                now = replace(now, expires_s=None)
            ends = [float("inf") if k.expires_s is None else k.expires_s for k in (keep, now)]
            if (keep.priority, ends[0]) > (now.priority, ends[1]):
                self.wish[block] = replace(keep, tenant=now.tenant)
        elif block in self.content and self._priority(block) < DEFAULT_PRIORITY:
            self.wish[block] = Keep(tenant=self.wish[block].tenant)

    @rule(content=st.sampled_from([bytes([number]) for number in range(9)]))
    def forget(self, content):
        self.told.clear()
        self.pool.forget(digest_of(content))
        self.content = {b: c for b, c in self.content.items() if c != content}
        assert self.told == []

    @rule()
    def forget_all(self):
        self.told.clear()
        self.pool.forget_all()
        self.content.clear()
        assert self.told == []

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def all_agree(self):
        self.pool.check_integrity()
        assert self.pool.references() == self.hands
        assert self.pool.usage().num_cached == len(self._cached())
        assert self.pool.num_own_available == self.pool.usage().num_free + len(self._cached())
        for number in range(9):
            expected = next((b for b, c in self.content.items() if c == bytes([number])), None)
            assert found(self.pool, bytes([number])) == expected

    def teardown(self):
        for block, count in self.hands.items():
            for _ in range(count):
                self.pool.release(block)
        self.pool.forget_all()
        assert self.pool.usage() == KVUsage(0, 0, 0, self.NUM_BLOCKS)


PoolModel.TestCase.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPoolAgainstModel = PoolModel.TestCase
