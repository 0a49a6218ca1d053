"""Shapes: every step that the plan allows fits into some, and the number of shapes is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zif_tpu.buckets import Buckets, StepShape, sizes


@pytest.mark.parametrize(
    ("smallest", "largest", "found"),
    [(8, 3, (3,)), (8, 8, (8,)), (8, 9, (8, 9)), (8, 256, (8, 32, 128, 256)), (16, 1, (1,))],
)
def test_sizes_grow_and_end_with_the_limit(smallest, largest, found):
    assert sizes(smallest, largest) == found


@given(st.data())
def test_every_step_is_cut_into_shapes_that_are_compiled(data):
    max_seqs, max_blocks = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    max_tokens = data.draw(st.integers(1, 600))
    buckets = Buckets.of(max_seqs, max_tokens, max_blocks)
    counts = data.draw(st.lists(st.integers(1, max(1, max_tokens // min(max_seqs, 8))), min_size=1, max_size=max_seqs))
    while sum(counts) > max_tokens:
        counts.pop()
    counts = counts or [1]
    blocks = [data.draw(st.integers(1, max_blocks)) for _ in counts]
    groups = list(buckets.groups(counts, blocks))
    assert sorted(request for group in groups for request in group.requests) == list(range(len(counts)))
    for group in groups:
        assert group.shape in buckets.shapes()
        assert len(group.requests) <= group.shape.rows
        assert all(counts[request] <= group.shape.width for request in group.requests)
        assert all(blocks[request] <= group.shape.blocks for request in group.requests)


def test_requests_that_decode_are_one_group_and_chunks_are_others():
    buckets = Buckets.of(16, 256, 64)
    groups = list(buckets.groups([1, 40, 1, 3], [3, 3, 60, 1]))
    assert [(group.shape, group.requests) for group in groups] == [
        (StepShape(8, 1, 64), (0, 2)),
        (StepShape(1, 16, 16), (3,)),
        (StepShape(1, 64, 16), (1,)),
    ]


def test_the_number_of_shapes_grows_slowly():
    small, large = Buckets.of(16, 256, 64), Buckets.of(256, 4096, 1024)
    assert len(small.shapes()) <= 20
    assert len(large.shapes()) <= 60


def test_a_step_beyond_the_largest_shape_breaks_the_promise_of_the_plan():
    with pytest.raises(AssertionError, match="beyond the largest size, 64"):
        list(Buckets.of(4, 64, 10).groups([65], [1]))


def test_larger_shapes_serve_in_place_of_one():
    buckets = Buckets.of(16, 256, 64)
    others = list(buckets.larger(StepShape(1, 16, 16)))
    assert others[0] == StepShape(1, 16, 64)
    assert all(o.rows >= 1 and o.width >= 16 and o.blocks >= 16 for o in others)
    assert StepShape(8, 1, 64) not in others
