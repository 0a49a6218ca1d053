"""Names of blocks and what they find: fixed digests, tenants apart, contents compared."""

import hashlib
import struct
from types import SimpleNamespace

import pytest

from support.control_plane import cut, full, new_request, sliding
from zif.contract import CacheKey, SamplingParams
from zif.kv import PagedBlockManager, hashing
from zif.kv.hashing import PrefixChain, canonical_tokens, root_content

PROMPT = list(range(1, 14))
KEY = CacheKey(salt="tenant-a", adapter="läufer", media=("m1", "m2"))


def digests(tokens, block_size, **fields):
    request = new_request(0, tokens, **fields)
    chain = PrefixChain(request, block_size)
    num_blocks = len(tokens) // block_size
    chain.extend(num_blocks)
    return [chain.digest(block).hex() for block in range(num_blocks)]


@pytest.mark.parametrize(
    ("block_size", "key", "expected"),
    [
        (4, CacheKey(), "1faf8c168be008a0cf92d71c3380f8d73da0948333de7b479c6d0bbd429af164"),
        (4, KEY, "bcc84196da1322f1cbad9eac7fdc775060054d3c736fe01040ebb4e22e88cf95"),
        (2, CacheKey(), "e4c719db5f15c973ad3b54e794023bba376807712e8be9e5a34b9e21fc5ac116"),
    ],
    ids=["plain", "keyed", "block size"],
)
def test_digests_never_change(block_size, key, expected):
    """These digests name blocks on disk and between machines: a change of encoding needs a new version string."""
    assert digests([1, 2, 3, 4, 5, 6, 7, 2**31], block_size, cache_key=key)[-1] == expected


def test_digests_follow_the_documented_encoding():
    texts = [text.encode() for text in (KEY.salt, KEY.adapter, *KEY.media)]
    root = b"zif.kv.1" + struct.pack("<5I", 4, *map(len, texts)) + b"".join(texts)
    first = hashlib.sha256(root + struct.pack("<4I", 9, 8, 7, 6)).digest()
    second = hashlib.sha256(first + struct.pack("<4I", 5, 4, 3, 2)).digest()
    assert digests([9, 8, 7, 6, 5, 4, 3, 2], 4, cache_key=KEY) == [first.hex(), second.hex()]


def test_tokens_are_little_endian_and_four_bytes():
    assert canonical_tokens([1, 2**32 - 1]) == b"\x01\0\0\0\xff\xff\xff\xff"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_does_not_fit_is_no_other_token(token):
    with pytest.raises(OverflowError):
        canonical_tokens([token])


def test_roots_of_different_keys_differ_however_the_texts_are_split():
    keys = [
        CacheKey(),
        CacheKey(salt="ab"),
        CacheKey(salt="a", adapter="b"),
        CacheKey(adapter="ab"),
        CacheKey(media=("ab",)),
        CacheKey(media=("a", "b")),
        CacheKey(media=("",)),
        CacheKey(media=("b", "a")),
    ]
    roots = [root_content(key, size) for key in keys for size in (4, 8)]
    assert len(set(roots)) == len(roots)


def test_digests_are_computed_once_and_extended(monkeypatch):
    hashed = []
    monkeypatch.setattr(hashing, "hashlib", SimpleNamespace(sha256=lambda b: hashed.append(b) or hashlib.sha256(b)))
    request = new_request(0, PROMPT)
    PrefixChain(request, 4).extend(2)
    PrefixChain(request, 4).extend(3)
    assert len(hashed) == 3


def test_a_look_up_hashes_little_beyond_what_it_finds_and_nothing_twice(monkeypatch):
    hashed = []
    monkeypatch.setattr(hashing, "hashlib", SimpleNamespace(sha256=lambda b: hashed.append(b) or hashlib.sha256(b)))
    cache = Cache(full(), num_slabs=600)
    cache.compute(PROMPT)
    hashed.clear()
    request = new_request(0, [*PROMPT[:12], *[0] * 2000])
    cache.manager.begin(request)
    assert request.num_computed_tokens == 12
    assert len(hashed) <= 64
    assert len(set(hashed)) == len(hashed)
    cache.manager.release(request)
    hashed.clear()
    cache.manager.begin(request)
    assert hashed == []


class Cache:
    """A block manager to which prompts are shown one after the other."""

    def __init__(self, *specs, num_slabs=64, caching=True):
        self.manager = PagedBlockManager(cut(specs, num_slabs), enable_prefix_caching=caching, max_step_tokens=64)
        self._num_requests = 0

    def compute(self, tokens, **fields):
        """Compute a prompt, let go of it, and return how much of it was found."""
        request = new_request(self._num_requests, tokens, **fields)
        self._num_requests += 1
        self.manager.begin(request)
        found = request.num_computed_tokens
        assert self.manager.reserve(request, len(tokens))
        request.num_computed_tokens = len(tokens)
        self.manager.commit(request)
        self.manager.release(request)
        self.manager.check_integrity([])
        return found


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (PROMPT, 12),
        (PROMPT[:12], 8),  # one token is always left to compute
        ([*PROMPT[:11], 99, 99], 8),
        ([99, *PROMPT[1:]], 0),
        (PROMPT[4:], 0),  # the same tokens elsewhere
        (PROMPT[:4], 0),
        (PROMPT[:5], 4),
    ],
)
def test_whole_blocks_of_the_common_prefix_are_found(tokens, found):
    cache = Cache(full())
    assert cache.compute(PROMPT) == 0
    assert cache.compute(tokens) == found


@pytest.mark.parametrize(
    "other",
    [CacheKey(salt="b"), CacheKey(adapter="b"), CacheKey(media=("b",)), CacheKey(salt="a", media=("b",))],
    ids=str,
)
def test_what_conditions_the_computation_separates_equal_tokens(other):
    cache = Cache(full())
    cache.compute(PROMPT, cache_key=CacheKey(salt="a"))
    assert cache.compute(PROMPT, cache_key=other) == 0
    assert cache.compute(PROMPT, cache_key=other) == 12
    assert cache.compute(PROMPT, cache_key=CacheKey(salt="a")) == 12


def test_without_caching_nothing_is_found():
    cache = Cache(full(), caching=False)
    assert [cache.compute(PROMPT), cache.compute(PROMPT)] == [0, 0]


def test_reset_forgets_every_prefix():
    cache = Cache(full(), sliding(5))
    cache.compute(PROMPT)
    cache.manager.reset_prefix_cache()
    assert cache.compute(PROMPT) == 0


def test_prompt_logprobs_skip_nothing_but_leave_their_blocks_to_others():
    cache = Cache(full())
    cache.compute(PROMPT)
    assert cache.compute(PROMPT, sampling=SamplingParams(prompt_logprobs=0)) == 0
    assert cache.compute(PROMPT) == 12


def test_groups_of_different_block_sizes_agree_on_a_common_boundary():
    cache = Cache(full(6), sliding(8, 4))
    tokens = list(range(1, 50))
    cache.compute(tokens)
    assert cache.compute(tokens[:30]) == 24
    assert cache.compute(tokens[:24]) == 12


def test_a_window_needs_only_the_end_of_the_prefix():
    """The windowed group's early blocks are evicted; the full group's are all there."""
    cache = Cache(full(), sliding(5), num_slabs=24)
    cache.compute(PROMPT)
    small = cache.manager._pools[1]
    small.forget(bytes.fromhex(digests(PROMPT, 4)[0]))
    assert cache.compute(PROMPT) == 12


def test_a_window_whose_end_is_gone_shortens_the_prefix_for_all_groups():
    cache = Cache(full(), sliding(5), num_slabs=24)
    cache.compute(PROMPT)
    small = cache.manager._pools[1]
    small.forget(bytes.fromhex(digests(PROMPT, 4)[2]))
    assert cache.compute(PROMPT) == 8


class _Constant:
    def digest(self):
        return b"\7" * 32


@pytest.mark.parametrize(
    ("tokens", "key"),
    [([9] * 13, CacheKey(salt="a")), (PROMPT, CacheKey(salt="b")), (PROMPT, CacheKey(adapter="a"))],
    ids=["tokens", "salt", "adapter"],
)
def test_a_collision_of_digests_finds_nothing(monkeypatch, tokens, key):
    monkeypatch.setattr(hashing, "hashlib", SimpleNamespace(sha256=lambda content: _Constant()))
    cache = Cache(full())
    cache.compute(PROMPT, cache_key=CacheKey(salt="a"))
    assert cache.compute(tokens, cache_key=key) == 0
    assert cache.compute(PROMPT, cache_key=CacheKey(salt="a")) == 4, "one block alone can have the one digest"
