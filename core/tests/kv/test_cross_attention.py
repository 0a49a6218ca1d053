"""Blocks of an encoder's output: counted in its tokens, written once, shared by input, all together or not."""

import pytest

from support.control_plane import Engine, cross, cut, expected_output, full, new_request, recurrent, sliding
from zif.contract import CacheKey, FinishReason, PrefixMiss, Workload
from zif.null.platform import NullPlatform

SPECS = (full(), cross())


def listening(request_id, prompt, media, num_encoder_tokens, **fields):
    key = CacheKey(media=(media,))
    return new_request(request_id, prompt, cache_key=key, num_encoder_tokens=num_encoder_tokens, **fields)


def engine(specs=SPECS, num_slabs=60, **options):
    return Engine(cut(specs, num_slabs), **options)


@pytest.mark.parametrize("specs", [SPECS, (full(), sliding(5), cross(2)), (cross(8), full(), recurrent())])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_slabs", [16, 80])
def test_requests_see_their_own_input_and_nobody_elses(specs, caching, num_slabs):
    stack = engine(specs, num_slabs, budget=7, caching=caching)
    prompt = list(range(11))
    requests = [
        listening(0, prompt, "a", 9),
        listening(1, prompt, "b", 9),
        listening(2, prompt, "a", 20),
        listening(3, prompt, "c", 0),
        listening(4, prompt[:6], "a", 9),
    ]
    stack.add(*requests)
    stack.run()
    for request in requests:
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == expected_output(request, specs)
    assert len({tuple(request.output_token_ids) for request in requests[:4]}) == 4
    assert stack.num_owned == (0,) * len(specs)


def test_blocks_are_counted_in_encoder_tokens():
    stack = engine()
    request = listening(0, [1, 2, 3], "a", 9, max_total_tokens=30)
    stack.add(request)
    for _ in range(6):
        stack.step()
    assert [len(table) for table in request.block_ids] == [2, 3]
    assert stack.num_owned == (2, 3)


def test_the_same_input_is_found_as_a_whole():
    stack = engine()
    stack.add(listening(0, list(range(9)), "a", 9))
    stack.run()
    same, other = listening(1, list(range(9)), "a", 9), listening(2, list(range(9)), "b", 9)
    stack.add(same, other)
    stack.step()
    assert same.num_cached_tokens == 8
    assert same.prefix.num_tokens == 8
    assert other.num_cached_tokens == 0
    assert (other.prefix.miss, other.prefix.kind) == (PrefixMiss.NOT_SEEN, "cross")
    assert set(same.block_ids[1]).isdisjoint(other.block_ids[1])
    stack.run()
    for request in (same, other):
        assert request.output_token_ids == expected_output(request, SPECS)


def test_without_its_encoder_blocks_a_prefix_is_not_found():
    stack = engine()
    stack.add(listening(0, list(range(9)), "a", 9))
    stack.run()
    stack.blocks._pools[1].forget_all()
    again = listening(1, list(range(9)), "a", 9)
    stack.add(again)
    stack.run()
    assert again.num_cached_tokens == 0
    assert again.output_token_ids == expected_output(again, SPECS)


def test_a_request_that_shares_nothing_of_its_prompt_writes_its_own_copy():
    stack = engine()
    first, second = listening(0, [1, 2, 3], "a", 9), listening(1, [4, 5, 6], "a", 9)
    stack.add(first)
    stack.step()
    stack.add(second)
    stack.step()
    assert set(first.block_ids[1]).isdisjoint(second.block_ids[1])
    stack.run()
    assert second.output_token_ids == expected_output(second, SPECS)


def test_preempted_requests_get_their_input_again():
    stack = engine(num_slabs=12, caching=False)
    requests = [listening(i, [i] * 6, f"{i}", 9, max_total_tokens=20) for i in range(3)]
    stack.add(*requests)
    stack.run()
    assert sum(request.num_preemptions for request in requests)
    for request in requests:
        assert request.output_token_ids == expected_output(request, SPECS)


def test_the_longest_input_counts_when_memory_is_planned():
    def kv_bytes(max_encoder_tokens):
        workload = Workload("float32", (full(), cross(4, max_encoder_tokens)), (8,), frozenset(), 0, 0, 64, 2, 16)
        return NullPlatform().plan(workload).memory.kv_bytes

    assert kv_bytes(400) - kv_bytes(40) >= 2 * 360 * 8
