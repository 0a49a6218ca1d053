"""The block manager against a model of memory that knows, byte by byte, what must be where."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.control_plane import cut, full, new_request, samples_of, sliding
from zif.contract import CacheKey, SamplingParams
from zif.kv import PagedBlockManager

ARENAS = [
    cut((full(4),), 12),
    cut((full(4), sliding(5, 4)), 14),
    cut((full(4), sliding(3, 2)), 10, 10),
    cut((full(2), sliding(7, 4)), 10, 6),
    cut((sliding(6, 4), full(6), sliding(1, 2)), 12, 13),
    cut((sliding(4, 3), sliding(9, 2)), 12, 7),
]
MAX_STEP_TOKENS = 9
KEYS = [CacheKey(), CacheKey(salt="other")]


class Memory:
    """What each word of the arena holds: the group, the cache key and every token up to the one it stands for."""

    def __init__(self, arena):
        self.arena = arena
        self.words = {}

    def _address(self, request, group, position):
        size = self.arena.groups[group].spec.block_size
        block = request.block_ids[group][position // size]
        assert block, f"request {request.request_id} reads or writes the null block at position {position}"
        return block * size + position % size

    def _tag(self, request, group, position):
        return group, request.cache_key, tuple(request.token_ids[: position + 1])

    def write(self, request, position):
        for group in range(len(self.arena.groups)):
            self.words[self._address(request, group, position)] = self._tag(request, group, position)

    def check(self, request):
        """Assert that the next token finds the KV of every computed position that it sees."""
        for group, held in enumerate(self.arena.groups):
            window = getattr(held.spec, "window", request.num_computed_tokens + 1)
            for position in range(max(0, request.num_computed_tokens - window + 1), request.num_computed_tokens):
                word = self.words.get(self._address(request, group, position))
                assert word == self._tag(request, group, position), (request.request_id, group, position)


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of calls that a scheduler may make."""

    @initialize(arena=st.sampled_from(ARENAS), caching=st.booleans())
    def start(self, arena, caching):
        self.arena = arena
        self.caching = caching
        self.manager = PagedBlockManager(arena, enable_prefix_caching=caching, max_step_tokens=MAX_STEP_TOKENS)
        self.memory = Memory(arena)
        self.live = []
        self.num_requests = 0

    def _draw(self, data):
        return data.draw(st.sampled_from(self.live)) if self.live else None

    def _add(self, request, source=None):
        self.num_requests += 1
        self.manager.begin(request, source)
        assert 0 <= request.num_computed_tokens < request.num_tokens
        assert request.capacity == request.num_computed_tokens
        self.live.append(request)

    @rule(
        length=st.integers(1, 30),
        stem=st.sampled_from([0, 1]),
        branch=st.integers(0, 30),
        key=st.sampled_from(KEYS),
        logprobs=st.sampled_from([None, None, None, 0]),
    )
    def begin(self, length, stem, branch, key, logprobs):
        tokens = [(stem if position < branch else stem + 2) for position in range(length)]
        sampling = SamplingParams(prompt_logprobs=logprobs)
        request = new_request(self.num_requests, tokens, cache_key=key, sampling=sampling)
        self._add(request)
        if logprobs is not None or not self.caching:
            assert request.num_computed_tokens == 0

    @rule(data=st.data())
    def begin_from_source(self, data):
        sources = [r for r in self.live if r.num_computed_tokens >= r.num_prompt_tokens]
        if sources:
            source = data.draw(st.sampled_from(sources))
            prompt = source.token_ids[: source.num_prompt_tokens]
            self._add(new_request(self.num_requests, prompt, cache_key=source.cache_key), source)

    @rule(data=st.data(), num_tokens=st.integers(1, MAX_STEP_TOKENS))
    def compute(self, data, num_tokens):
        request = self._draw(data)
        if request is None:
            return
        computed = request.num_computed_tokens
        end = min(request.num_tokens, computed + num_tokens)
        before = [list(blocks) for blocks in request.block_ids]
        could_hold = self.manager.can_hold(request, end)
        if not self.manager.reserve(request, end):
            assert [list(blocks) for blocks in request.block_ids] == before
            assert not (could_hold and len(self.arena.groups) == 1)
            return
        assert request.capacity >= end
        for position in range(computed, end):
            self.memory.write(request, position)
        request.num_computed_tokens = end
        if end >= request.next_commit:
            self.manager.commit(request)
        if end == request.num_tokens:
            request.token_ids.append(data.draw(st.integers(0, 2)))

    @rule(data=st.data())
    def release(self, data):
        request = self._draw(data)
        if request is not None:
            self.live.remove(request)
            self.manager.release(request)
            assert request.block_ids == ()

    @rule()
    def reset(self):
        self.manager.reset_prefix_cache()
        assert all(usage.num_cached == 0 for usage in self.manager.usage())

    @invariant()
    def nothing_is_lost(self):
        self.manager.check_integrity(self.live)
        for request in self.live:
            self.memory.check(request)

    @invariant()
    def only_what_is_visible_is_held(self):
        for request in self.live:
            for group, blocks in zip(self.arena.groups, request.block_ids, strict=True):
                window = getattr(group.spec, "window", 10**6)
                first = max(0, request.num_computed_tokens - window + 1) // group.spec.block_size
                assert not any(blocks[:first])
                assert all(blocks[first:])

    def teardown(self):
        for request in self.live:
            self.manager.release(request)
        self.manager.check_integrity([])
        assert all(usage.num_owned == 0 for usage in self.manager.usage())


BlockManagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestBlockManager = BlockManagerMachine.TestCase


def manager_of(*specs, num_slabs=16, caching=True, slab_words=None):
    arena = cut(specs, num_slabs, slab_words)
    return PagedBlockManager(arena, enable_prefix_caching=caching, max_step_tokens=8)


def compute(manager, request, num_tokens):
    assert manager.reserve(request, num_tokens)
    request.num_computed_tokens = num_tokens
    manager.commit(request)


def test_a_request_that_holds_blocks_cannot_begin_again():
    manager, request = manager_of(full()), new_request(0, [1])
    manager.begin(request)
    with pytest.raises(AssertionError, match="already holds"):
        manager.begin(request)


@pytest.mark.parametrize("caching", [True, False])
def test_samples_share_the_whole_blocks_of_the_prompt(caching):
    manager = manager_of(full(), caching=caching)
    leader, follower = samples_of(0, list(range(10)), 2)
    manager.begin(leader)
    compute(manager, leader, 10)
    manager.begin(follower, leader)
    assert follower.num_computed_tokens == 8
    assert follower.block_ids[0] == leader.block_ids[0][:2]
    assert manager.usage()[0].num_owned == 3
    manager.release(leader)
    manager.check_integrity([follower])
    assert manager.usage()[0].num_owned == 2


def test_a_sample_shares_no_output_of_its_source():
    manager = manager_of(full(), caching=False)
    leader, follower = samples_of(0, list(range(6)), 2)
    manager.begin(leader)
    leader.token_ids += [7] * 8
    compute(manager, leader, 13)
    follower.token_ids += [9] * 8
    manager.begin(follower, leader)
    assert follower.num_computed_tokens == 4


def test_a_source_whose_window_has_moved_on_is_no_source():
    manager = manager_of(full(), sliding(3), caching=False)
    leader, follower = samples_of(0, list(range(9)), 2)
    manager.begin(leader)
    leader.token_ids += [7] * 8
    compute(manager, leader, 16)
    manager.begin(follower, leader)
    assert follower.num_computed_tokens == 0


def test_a_failed_reservation_returns_what_earlier_groups_gave():
    manager = manager_of(full(4), sliding(64, 4), num_slabs=5)
    request = new_request(0, list(range(12)))
    manager.begin(request)
    assert not manager.reserve(request, 12)
    assert request.block_ids == ([], [])
    manager.check_integrity([request])
    assert manager.reserve(request, 8)


def test_blocks_behind_the_window_go_back():
    manager = manager_of(sliding(5, 4), caching=False)
    request = new_request(0, list(range(20)))
    manager.begin(request)
    compute(manager, request, 8)
    assert request.next_commit == 12, "position 4 is the first visible one of position 8: the next block goes at 12"
    assert [bool(block) for block in request.block_ids[0]] == [False, True]
    compute(manager, request, 12)
    assert [bool(block) for block in request.block_ids[0]] == [False, False, True]


@pytest.mark.parametrize(
    ("specs", "num_slabs", "slab_words", "longest"),
    [
        ((full(4),), 8, None, 32),
        ((full(4), full(4)), 8, None, 16),
        ((full(4), sliding(4, 4)), 8, None, 16),  # the window's peak: 4 - 1 + 8 tokens, 3 blocks and one for straddling
        ((sliding(4, 4),), 4, None, 10**6),
        ((sliding(4, 4),), 3, None, 12),
    ],
)
def test_fits_is_what_a_lone_request_can_reach(specs, num_slabs, slab_words, longest):
    manager = manager_of(*specs, num_slabs=num_slabs, slab_words=slab_words)
    assert manager.fits(longest)
    assert longest == 10**6 or not manager.fits(longest + 1)
