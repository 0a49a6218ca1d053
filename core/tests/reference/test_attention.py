"""The reference attention against dense float64 arithmetic, over permuted block tables and NaN-filled memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paged_attention import BOUND_LAYER, LAYERS, PagedStep, StepCase
from zif.reference.attention import ReferenceAttention

MIXED = ((1, 1), (1, 16), (17, 17), (1, 100), (30, 70), (33, 33), (1, 64))


@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
def test_mixed_batches_match_dense_attention(window, extras):
    step = PagedStep(StepCase(MIXED, window=window, **extras))
    torch.testing.assert_close(step.run(ReferenceAttention()).double(), step.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 1), (1, 8), (4, 1), (3, 2)])
@pytest.mark.parametrize("head_dim", [8, 80, 256])
def test_grouped_heads_match_dense_attention(num_kv_heads, group_size, head_dim):
    case = StepCase(MIXED, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim)
    step = PagedStep(case)
    torch.testing.assert_close(step.run(ReferenceAttention()).double(), step.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_one_rounding_only(dtype):
    step = PagedStep(StepCase(MIXED, dtype=dtype, window=20, softcap=3.0, sinks=True))
    torch.testing.assert_close(
        step.run(ReferenceAttention()).double(), step.expected(), atol=1e-5, rtol=torch.finfo(dtype).eps
    )


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_any_batch_matches_dense_attention(requests, block_size, window, seed):
    spans = tuple((length, length + context) for length, context in requests)
    step = PagedStep(StepCase(spans, block_size=block_size, window=window, seed=seed))
    torch.testing.assert_close(step.run(ReferenceAttention()).double(), step.expected(), atol=1e-5, rtol=1e-5)


def test_write_keeps_every_byte_that_no_slot_names():
    step = PagedStep(StepCase(((3, 3), (1, 1))))
    step.bind(ReferenceAttention())
    step.write(ReferenceAttention(), [(0, 0, 3), (1, 0, 1)])
    written = step.elements.view(step.num_blocks, len(LAYERS), 2, 16, 2, 16).isfinite().all(-1).all(-1)
    assert written.sum() == 2 * 4
    assert written[step.table[0, 0], BOUND_LAYER, :, :3].all()
    assert written[step.table[1, 0], BOUND_LAYER, :, 0].all()


def test_a_nan_stays_in_its_request():
    step = PagedStep(StepCase(MIXED))
    step.values[3][50] = torch.nan
    faulty = step.run(ReferenceAttention()).isnan().flatten(1).any(1)
    rows = torch.tensor([length for length, _ in MIXED]).cumsum(0)
    assert faulty.nonzero().flatten().tolist() == [int(rows[2])]


def test_the_layout_says_what_bind_does():
    step = PagedStep(StepCase(((1, 1),)))
    step.bind(ReferenceAttention())
    layout = step.arena.groups[0].layout
    assert dict(zip(layout.axes, layout.shape, strict=True)) == {
        "layer": 3,
        "kv": 2,
        "token": 16,
        "head": 2,
        "element": 16,
    }
    assert layout.block_bytes == 3 * 2 * 16 * 2 * 16 * 4
