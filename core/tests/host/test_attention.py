"""Tiled attention against dense float64 arithmetic and against the reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paged_attention import BOUND_LAYER, LAYERS, PagedStep, StepCase
from zif.host.attention import TiledAttention
from zif.host.tiling import TileLimits
from zif.reference.attention import ReferenceAttention

SMALL_TILES = TileLimits(
    decode_rows=3, decode_tokens=48, prompt_keys=32, prompt_queries=7, fused_queries=9, fused_keys=1 << 20
)
NEVER_FUSED = TileLimits(
    decode_rows=4, decode_tokens=64, prompt_keys=32, prompt_queries=16, fused_queries=9, fused_keys=0
)
LIMITS = {"default": TileLimits(), "small": SMALL_TILES, "never fused": NEVER_FUSED}
INT8 = torch.int8
MIXED = ((1, 1), (1, 16), (17, 17), (1, 100), (30, 70), (33, 33), (1, 64), (2, 80))
EXTRAS = ({}, {"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True})


def _lengths(block_size):
    return (1, block_size - 1, block_size, block_size + 1, 7 * block_size + 3)


def _assert_exact(step, backend):
    torch.testing.assert_close(step.run(backend).double(), step.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("window", [None, 1, 5, 40, 1000])
@pytest.mark.parametrize("extras", EXTRAS)
def test_mixed_batches_match_dense_attention(limits, window, extras):
    _assert_exact(PagedStep(StepCase(MIXED, window=window, **extras)), TiledAttention(LIMITS[limits]))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 24])
def test_lengths_around_block_borders(limits, block_size, window):
    lengths = _lengths(block_size)
    requests = tuple((length, length + context) for length, context in itertools.product(lengths, (0, *lengths)))
    step = PagedStep(StepCase(requests, block_size=block_size, window=window, num_kv_heads=1))
    _assert_exact(step, TiledAttention(LIMITS[limits]))


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 1), (1, 8), (4, 1), (3, 2)])
@pytest.mark.parametrize("head_dim", [1, 8, 80, 256, 512])
def test_grouped_heads_match_dense_attention(num_kv_heads, group_size, head_dim):
    case = StepCase(MIXED, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim)
    _assert_exact(PagedStep(case), TiledAttention(SMALL_TILES))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extras", [{}, {"window": 20}, {"softcap": 3.0, "sinks": True}])
def test_half_types_err_at_most_twice_as_much_as_the_reference(limits, dtype, extras):
    step = PagedStep(StepCase(MIXED, dtype=dtype, head_dim=64, **extras))
    expected = step.expected()
    ours, reference = step.run(TiledAttention(LIMITS[limits])), step.run(ReferenceAttention())
    rms = [(out.double() - expected).square().mean().sqrt() for out in (ours, reference)]
    worst = [(out.double() - expected).abs().max() for out in (ours, reference)]
    assert rms[0] <= 2 * rms[1]
    assert worst[0] <= 2 * worst[1] + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_cache_of_another_dtype_matches_the_reference(dtypes, limits):
    step = PagedStep(StepCase(MIXED, dtype=dtypes[0], kv_dtype=dtypes[1]))
    ours, reference = step.run(TiledAttention(LIMITS[limits])), step.run(ReferenceAttention())
    assert ours.dtype is dtypes[0]
    tolerance = 1e-5 if dtypes[0] is torch.float32 else 2e-2
    torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 15, 16, 17, 40]), st.integers(0, 90)), min_size=1, max_size=6
    ),
    block_size=st.sampled_from([8, 16, 32]),
    window=st.none() | st.integers(1, 60),
    extras=st.sampled_from(EXTRAS),
    limits=st.sampled_from(sorted(LIMITS)),
    seed=st.integers(0, 1000),
)
def test_any_batch_matches_dense_attention(requests, block_size, window, extras, limits, seed):
    spans = tuple((length, length + context) for length, context in requests)
    case = StepCase(spans, block_size=block_size, window=window, seed=seed, num_kv_heads=1, **extras)
    _assert_exact(PagedStep(case), TiledAttention(LIMITS[limits]))


@pytest.mark.parametrize("window", [None, 50])
def test_requests_may_share_blocks(window):
    requests = ((1, 49), (1, 80), (20, 100), (3, 35))
    _assert_exact(PagedStep(StepCase(requests, shared_blocks=2, window=window)), TiledAttention(SMALL_TILES))


def test_a_chunk_whose_last_part_is_one_query_sees_all_its_context():
    limits = TileLimits(fused_queries=9)
    _assert_exact(PagedStep(StepCase(((10, 40), (19, 19)))), TiledAttention(limits))


def test_a_batch_of_no_prompt_or_no_decode_works():
    for requests in (((1, 5), (1, 90)), ((5, 5), (40, 90))):
        _assert_exact(PagedStep(StepCase(requests)), TiledAttention())


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("extras", [{}, {"sinks": True}])
def test_a_nan_stays_in_its_request(limits, extras):
    step = PagedStep(StepCase(MIXED, **extras))
    clean = step.run(TiledAttention(LIMITS[limits]))
    step.values[3][50] = torch.nan
    step.keys[4][10] = torch.nan
    out = step.run(TiledAttention(LIMITS[limits]))
    ends = torch.tensor([length for length, _ in MIXED]).cumsum(0).tolist()
    hit = torch.zeros(len(out), dtype=torch.bool)
    hit[ends[2] : ends[4]] = True
    assert out[ends[2]].isnan().all()
    assert out[ends[3] : ends[4]].isnan().flatten(1).any(1).all()
    assert torch.equal(out[~hit], clean[~hit])


def test_write_keeps_every_byte_that_no_slot_names():
    backend = TiledAttention()
    step = PagedStep(StepCase(((3, 3), (1, 1))))
    step.bind(backend)
    step.write(backend, [(0, 0, 3), (1, 0, 1)])
    written = step.elements.view(step.num_blocks, len(LAYERS), 2, 2, 16, 16).isfinite().all(-1).all(2 + 1)
    assert written.sum() == 2 * 4
    assert written[step.table[0, 0], BOUND_LAYER, :, :3].all()
    assert written[step.table[1, 0], BOUND_LAYER, :, 0].all()


def test_a_layer_whose_window_is_not_its_groups_is_caught():
    backend = TiledAttention()
    step = PagedStep(StepCase(((1, 5),), window=3))
    step.run(backend)
    step.params = type(step.params)(scale=1.0, window=4)
    with pytest.raises(AssertionError, match="window"):
        step.attend(backend)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("extras", EXTRAS)
def test_codes_match_dense_attention_over_codes_times_scales(limits, window, extras):
    _assert_exact(PagedStep(StepCase(MIXED, kv_dtype=INT8, window=window, **extras)), TiledAttention(LIMITS[limits]))


@pytest.mark.parametrize("backend", [TiledAttention, ReferenceAttention])
@pytest.mark.parametrize("head_dim", [1, 3, 33, 80, 96, 128])
def test_codes_of_any_head_size(backend, head_dim):
    case = StepCase(MIXED, kv_dtype=INT8, head_dim=head_dim, block_size=8, shared_blocks=0)
    _assert_exact(PagedStep(case), backend())


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_under_half_types_lose_only_the_rounding_of_the_result(limits, dtype):
    step = PagedStep(StepCase(MIXED, dtype=dtype, kv_dtype=INT8, head_dim=64))
    expected = step.expected()
    error = (step.run(TiledAttention(LIMITS[limits])).double() - expected).abs().max()
    assert error <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("backend", [TiledAttention, ReferenceAttention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lone_token_reads_back_as_codes_times_scale(backend, dtype):
    """Ties go to even; zeros stay zeros; the largest keeps its sign."""
    step = PagedStep(StepCase(((1, 1),), num_kv_heads=4, group_size=1, head_dim=8, dtype=dtype, kv_dtype=INT8))
    ties = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -63.5, 126.0])
    rows = torch.stack((ties, -2 * ties, torch.zeros(8), torch.tensor([1e30, 4e27, 3e27, -1e30, 0, 1, 5e27, -4e27])))
    step.values[0][0] = rows.to(dtype)
    codes = torch.tensor(
        [
            [127, 0, 2, 2, 0, -2, -64, 126],
            [-127, 0, -2, -2, 0, 2, 64, -126],
            [0] * 8,
            [127, 1, 0, -127, 0, 0, 1, -1],
        ]
    )
    scales = step.values[0][0].float().abs().amax(-1, keepdim=True) / 127
    assert torch.equal(step.run(backend())[0], (codes * scales).to(dtype))


@pytest.mark.parametrize("backend", [TiledAttention, ReferenceAttention])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_codes_of_what_is_not_finite_are_nan_in_their_head_alone(backend, bad):
    step = PagedStep(StepCase(MIXED, kv_dtype=INT8))
    clean = step.run(backend())
    step.values[3][50, 1, 4] = bad
    step.keys[6][63, 0, 0] = bad
    out = step.run(backend())
    rows = torch.arange(len(out))
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    for request, heads in ((3, slice(2, 4)), (6, slice(2))):
        hit[rows == sum(length for length, _ in MIXED[:request]), heads] = True
    assert out[hit].isnan().all()
    assert torch.equal(out[~hit], clean[~hit])


def test_a_token_is_coded_the_same_alone_and_among_others():
    backend, step = TiledAttention(), PagedStep(StepCase(((40, 40), (9, 9)), kv_dtype=INT8, head_dim=30))
    step.bind(backend)
    step.write(backend, [(0, 0, 40), (1, 0, 9)])
    together = step.elements
    step.bind(backend)
    for request, length in ((1, 9), (0, 40)):
        for position in range(length):
            step.write(backend, [(request, position, position + 1)])
    assert torch.equal(step.elements, together)
