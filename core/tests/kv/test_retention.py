"""How long blocks are kept: wishes of requests by token range, their ends, and quotas of tenants."""

import pytest

from support.control_plane import cut, full, new_request, sliding
from zif.contract import CacheKey, Retention
from zif.kv import PagedBlockManager, Retainer
from zif.kv.retention import DEFAULT_KEEP, Keep, keep_of

SIZE = 4
FULL = full(SIZE)


@pytest.mark.parametrize(
    ("wishes", "start", "expected"),
    [
        ((), 0, Keep()),
        ((Retention(90),), 400, Keep(90)),
        ((Retention(90, 0, 8),), 4, Keep(90)),
        ((Retention(90, 0, 8),), 8, Keep()),
        ((Retention(90, 0, 9),), 8, Keep(90)),
        ((Retention(90, 7),), 4, Keep(90)),
        ((Retention(90, 8),), 4, Keep()),
        ((Retention(10),), 4, Keep(10)),
        ((Retention(10), Retention(30, 0, 4)), 0, Keep(30)),
        ((Retention(30, 0, 4), Retention(10)), 0, Keep(30)),
        ((Retention(80, duration_s=5.0),), 0, Keep(80, 105.0)),
        ((Retention(80, duration_s=5.0), Retention(80, duration_s=9.0)), 0, Keep(80, 109.0)),
        ((Retention(80), Retention(80, duration_s=9.0)), 0, Keep(80)),
        ((Retention(70), Retention(80, duration_s=0.0)), 0, Keep(80, 100.0)),
    ],
)
def test_the_longest_wish_that_touches_a_block_counts(wishes, start, expected):
    assert keep_of(new_request(0, [1], retention=wishes), start, start + SIZE, 100.0) == expected


def test_a_request_without_wishes_costs_nothing():
    retainer = Retainer(lambda: 0.0, (("a", 10),))
    plain, tenant = new_request(0, [1]), new_request(1, [1], tenant="a")
    for request in (plain, tenant):
        retainer.begin(request)
    assert retainer.keep(plain, 0, SIZE) is DEFAULT_KEEP
    assert retainer.keep(tenant, 0, SIZE) is retainer.keep(tenant, SIZE, 2 * SIZE)


class Cache:
    """A block manager on a clock set by hand, to which prompts are shown one after the other."""

    def __init__(self, num_blocks, specs=(FULL,), quotas=()):
        self.now = 0.0
        self.manager = PagedBlockManager(
            cut(specs, num_blocks),
            enable_prefix_caching=True,
            max_step_tokens=64,
            retainer=Retainer(lambda: self.now, quotas),
        )
        self._num_requests = 0

    def compute(self, name, num_blocks=2, **fields):
        """Compute a prompt of `num_blocks` blocks, which `name` sets apart from others; return its tokens found."""
        self._num_requests += 1
        request = new_request(self._num_requests, [name] * (num_blocks * SIZE), **fields)
        self.manager.begin(request)
        found = request.num_computed_tokens
        assert self.manager.reserve(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
        self.manager.commit(request)
        self.manager.release(request)
        self.manager.check_integrity([])
        return found

    def holds(self, name, num_blocks=2):
        """Count the tokens of a prompt that would be found, changing no order."""
        probe = new_request(0, [name] * (num_blocks * SIZE + 1))
        return self.manager._finder.find(probe, num_blocks * SIZE).num_tokens


def test_blocks_of_high_priority_outlive_those_used_later():
    cache = Cache(6)
    cache.compute(1, retention=(Retention(90),))
    for name in (2, 3, 4, 5):
        cache.compute(name)
    assert [cache.holds(name) for name in (1, 2, 3, 4, 5)] == [8, 0, 0, 8, 8]


def test_blocks_of_low_priority_go_first():
    cache = Cache(6)
    for name, wishes in ((1, ()), (2, (Retention(10),)), (3, ())):
        cache.compute(name, retention=wishes)
    cache.compute(4)
    assert [cache.holds(name) for name in (1, 2, 3)] == [8, 0, 8]


def test_among_equal_priorities_the_least_recently_used_goes_whoever_wished_it():
    cache = Cache(6)
    for name, wishes in ((1, Retention(70, duration_s=9)), (2, Retention(70, duration_s=5)), (3, Retention(70))):
        cache.compute(name, retention=(wishes,))
    cache.compute(4)
    assert [cache.holds(name) for name in (1, 2, 3)] == [0, 8, 8]


def test_only_the_range_that_was_named_is_kept():
    cache = Cache(6)
    cache.compute(1, 4, retention=(Retention(90, 0, 6),))
    cache.compute(2, 4)
    assert cache.holds(1, 4) == 8


def test_a_priority_ends_and_its_blocks_are_as_old_as_their_last_use():
    cache = Cache(6)
    cache.compute(1, retention=(Retention(90, duration_s=10.0),))
    cache.compute(2)
    cache.now = 9.0
    cache.compute(3)
    cache.compute(4)
    assert [cache.holds(name) for name in (1, 2)] == [8, 0]
    cache.now = 10.0
    cache.compute(5)
    assert [cache.holds(name) for name in (1, 3, 4)] == [0, 8, 8]


def test_a_low_priority_ends_too():
    cache = Cache(6)
    cache.compute(1)
    cache.compute(2, retention=(Retention(0, duration_s=10.0),))
    cache.compute(3)
    cache.now = 11.0
    cache.compute(4)
    assert [cache.holds(name) for name in (1, 2, 3)] == [0, 8, 8]


def test_a_request_that_finds_a_prefix_prolongs_it():
    cache = Cache(6)
    cache.compute(1, 3)
    cache.compute(1, 3, retention=(Retention(90),))
    for name in (2, 3, 4):
        cache.compute(name)
    assert cache.holds(1, 2) == 8


def test_a_request_that_finds_a_prefix_does_not_shorten_it():
    cache = Cache(6)
    cache.compute(1, 3, retention=(Retention(90),))
    cache.compute(1, 3, retention=(Retention(5),))
    for name in (2, 3, 4):
        cache.compute(name)
    assert cache.holds(1, 3) == 12


def test_a_tenant_past_its_quota_gives_up_its_own_blocks_and_nobody_elses():
    cache = Cache(9, quotas=(("a", 40),))  # of 10 cells: 4 blocks
    cache.compute(1)
    for name in (2, 3, 4):
        cache.compute(name, tenant="a")
    assert [cache.holds(name) for name in (1, 2, 3, 4)] == [8, 0, 8, 8]
    assert cache.manager.usage()[0].num_cached == 6


def test_past_its_quota_a_tenant_keeps_the_beginning_of_a_long_prompt():
    cache = Cache(9, quotas=(("a", 30),))
    cache.compute(1, 6, tenant="a")
    assert cache.holds(1, 6) == 12


def test_inside_its_quota_a_tenant_loses_its_lowest_priority_first():
    cache = Cache(9, quotas=(("a", 40),))
    cache.compute(1, tenant="a", retention=(Retention(80),))
    cache.compute(2, tenant="a")
    cache.compute(3, tenant="a")
    assert [cache.holds(name) for name in (1, 2, 3)] == [8, 0, 8]


def test_a_tenant_without_room_keeps_nothing():
    cache = Cache(9, quotas=(("a", 0),))
    assert [cache.compute(1, tenant="a"), cache.compute(1, tenant="a")] == [0, 0]
    assert cache.manager.usage()[0].num_cached == 0


def test_quotas_hold_in_every_group_and_count_the_tenant_not_the_salt():
    cache = Cache(20, (FULL, sliding(5, SIZE)), (("a", 20),))
    for name in range(4):
        cache.compute(name, tenant="a", cache_key=CacheKey(salt="b"))
    limit = [cells * 20 // 100 for cells in (21, 21)]
    assert [usage.num_cached for usage in cache.manager.usage()] == limit


def test_nothing_is_remembered_of_requests_that_are_gone():
    cache = Cache(6)
    for name in range(1000):
        cache.now += 1.0
        cache.compute(name, retention=(Retention(60 + name % 3, duration_s=1e6),))
    retainer, order = cache.manager._retainer, cache.manager._pools[0]._order
    assert not retainer._arrivals_s
    assert len(order._lines) <= 8
    assert len(order._by_keep) <= 8
    assert sum(len(agenda._entries) for agenda in (order._ends, *order._agendas.values())) < 100
