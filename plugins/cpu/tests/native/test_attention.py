"""The native attention kernels against dense float64 arithmetic, on every instruction set."""

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from support.paged_attention import BOUND_LAYER, LAYERS, PagedStep, StepCase
from zif.contract import AttentionBackend
from zif.host.attention import TiledAttention
from zif.reference.attention import ReferenceAttention
from zif_cpu.attention import NativeAttention
from zif_cpu.library import DTYPE_CODES, INT8_CODE, AttentionCall, RowsCall

MIXED = ((1, 1), (1, 16), (17, 17), (1, 100), (30, 70), (33, 33), (1, 64), (2, 80))
LONG = ((1, 255), (1, 256), (1, 257), (4, 258), (16, 300), (1, 600), (70, 90))
EXTRAS = ({}, {"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True})
MAX_DRAFTS = 8
CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


@dataclass
class RawAttention(AttentionBackend):
    """The raw functions as a backend. A prepared step is its batch; the cache is as host memory's attention binds it.

    `requests`: rows of the step that are served, all by default.
    """

    raw: ctypes.CDLL
    requests: list[int] | None = None
    batch_invariant: bool = False

    def kv_layout(self, spec):
        return TiledAttention().kv_layout(spec)

    def bind(self, arena, group, memory):
        return TiledAttention().bind(arena, group, memory)

    def prepare(self, batch):
        return batch

    def write(self, key, value, cache, prepared):
        call = RowsCall(
            key=key.data_ptr(),
            value=value.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            slots=prepared.slots.ctypes.data,
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            block_stride=cache.block_stride * cache.keys.shape[1],
            tokens=len(key),
            kv_heads=key.shape[1],
            head_dim=key.shape[2],
            block_size=prepared.block_size,
            dtype=CODES[key.dtype],
            cache=INT8_CODE if cache.is_quantized else CODES[cache.keys.dtype],
        )
        self.raw.zif_cpu_store_kv(ctypes.byref(call))

    def attend(self, query, cache, prepared, params):
        out = torch.full(query.shape, torch.nan, dtype=query.dtype)
        num_requests = len(prepared.seq_lens)
        requests = np.array(self.requests if self.requests is not None else range(num_requests), dtype=np.int32)
        call = AttentionCall(
            query=query.data_ptr(),
            output=out.data_ptr(),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            sinks=None if params.sinks is None else params.sinks.data_ptr(),
            requests=requests.ctypes.data,
            query_start=prepared.query_start.ctypes.data,
            seq_lens=prepared.seq_lens.ctypes.data,
            block_table=prepared.block_table.ctypes.data,
            query_stride=query.stride(0),
            block_stride=cache.block_stride * cache.keys.shape[1],
            table_stride=prepared.block_table.shape[1],
            num_requests=len(requests),
            heads=query.shape[1],
            kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            block_size=prepared.block_size,
            window=params.window or 0,
            scale=params.scale,
            softcap=params.softcap or 0.0,
            dtype=CODES[query.dtype],
            cache=INT8_CODE if cache.is_quantized else CODES[cache.keys.dtype],
            batch_invariant=self.batch_invariant,
        )
        self.raw.zif_cpu_attend(ctypes.byref(call))
        return out


def _pointer_and_stride(tensor):
    return ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.stride(0))


@pytest.fixture
def native(library):
    return RawAttention(library.raw)


@pytest.fixture
def isa(request, library):
    """The instruction set in use."""
    return request.node.callspec.params["library"]


@pytest.fixture
def threads(library):
    """Let a test set the number of threads."""
    yield lambda count: library.raw.zif_cpu_use_threads(ctypes.c_int32(count))
    library.raw.zif_cpu_use_threads(ctypes.c_int32(1))


def _assert_exact(step, backend):
    torch.testing.assert_close(step.run(backend).double(), step.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("requests", [MIXED, LONG])
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("extras", EXTRAS)
def test_mixed_batches_match_dense_attention(native, requests, window, extras):
    _assert_exact(PagedStep(StepCase(requests, window=window, **extras)), native)


@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 128])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_around_block_borders(native, block_size, window, dtype):
    lengths = (1, max(1, block_size - 1), block_size + 1, 2 * block_size + 3)
    requests = tuple((length, length + context) for length, context in itertools.product(lengths, (0, *lengths)))
    step = PagedStep(StepCase(requests, block_size=block_size, window=window, num_kv_heads=1, head_dim=32, dtype=dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(step.run(native).double(), step.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(1, 1), (3, 2), (1, 71), (2, 7)])
@pytest.mark.parametrize("head_dim", [1, 8, 17, 80, 100, 512])
def test_grouped_heads_match_dense_attention(native, num_kv_heads, group_size, head_dim):
    requests = ((1, 16), (17, 17), (1, 100), (2, 80)) if group_size < 10 else ((1, 40), (3, 60))
    case = StepCase(requests, num_kv_heads=num_kv_heads, group_size=group_size, head_dim=head_dim)
    _assert_exact(PagedStep(case), native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 33, 64, 128])
@pytest.mark.parametrize("extras", [{}, {"window": 20}, {"softcap": 3.0, "sinks": True}])
def test_half_types_err_at_most_twice_as_much_as_the_reference(native, dtype, head_dim, extras):
    step = PagedStep(StepCase(MIXED + LONG, dtype=dtype, head_dim=head_dim, **extras))
    expected = step.expected()
    ours, reference = step.run(native), step.run(ReferenceAttention())
    rms = [(out.double() - expected).square().mean().sqrt() for out in (ours, reference)]
    worst = [(out.double() - expected).abs().max() for out in (ours, reference)]
    assert rms[0] <= 2 * rms[1]
    assert worst[0] <= 2 * worst[1] + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_row_depends_on_no_other_row_and_on_no_number_of_threads(
    library, isa, threads, dtype, head_dim, window, batch_invariant
):
    native = RawAttention(library.raw, batch_invariant=batch_invariant)
    requests, shape = (*LONG, (16, 900)), {"group_size": 3, "head_dim": head_dim}
    if isa == "amx" and dtype is torch.bfloat16 and not batch_invariant:
        # Steps that only decode are computed otherwise than those with a prompt.
        requests = tuple(request for request in requests if request[0] <= MAX_DRAFTS)
    step = PagedStep(StepCase(requests, dtype=dtype, window=window, **shape))
    alone = step.run(native)
    threads(3)
    assert torch.equal(step.run(native), alone)
    ends = torch.tensor([length for length, _ in requests]).cumsum(0).tolist()
    for row, (length, _) in enumerate(requests):
        served = step.run(RawAttention(library.raw, [row], batch_invariant))
        rows = slice(ends[row] - length, ends[row])
        assert torch.equal(served[rows], alone[rows])
        assert served.isnan().flatten(1).all(1).sum() == len(served) - length
    drafts = [row for row, (length, _) in enumerate(requests) if length <= MAX_DRAFTS]
    lone = PagedStep(StepCase(tuple((1, total) for _, total in requests), dtype=dtype, window=window, **shape))
    assert torch.equal(lone.run(native)[drafts], alone[[ends[row] - 1 for row in drafts]])


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [24, 32, 512])
@pytest.mark.parametrize("window", [None, 3])
def test_what_a_query_does_not_see_may_be_no_number(native, dtype, head_dim, window):
    requests = ((9, 20), (16, 300), (5, 5))
    step = PagedStep(StepCase(requests, dtype=dtype, window=window, head_dim=head_dim))
    clean, start = step.run(native), 0
    for row, (_, total) in enumerate(requests):
        step.keys[row][total - 2] = torch.nan
        step.values[row][total - 1] = torch.nan
    out = step.run(native)
    for length, _ in requests:
        end = start + length
        assert torch.equal(out[start : end - 2], clean[start : end - 2])
        assert out[end - 2 : end].isnan().all()
        start = end


@pytest.mark.parametrize("dtype", CODES)
def test_write_puts_rows_at_their_slots_and_keeps_all_else(native, dtype):
    step = PagedStep(StepCase(((3, 3), (1, 1)), dtype=dtype, head_dim=5))
    step.bind(native)
    fused = torch.randn(4, 6, 5).to(dtype)
    key, value = fused[:, 2:4], fused[:, 4:]
    batch = step.batch([(0, 0, 3), (1, 0, 1)])
    batch.slots[1] = -1
    native.write(key, value, step.cache, batch)
    expected = torch.full_like(step.elements, torch.nan).view(step.num_blocks, len(LAYERS), 2, 2, 16, 5)
    for token in (0, 2, 3):
        block, offset = divmod(int(batch.slots[token]), 16)
        expected[block, BOUND_LAYER, 0, :, offset] = key[token]
        expected[block, BOUND_LAYER, 1, :, offset] = value[token]
    torch.testing.assert_close(step.elements.view(expected.shape), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", CODES)
def test_a_long_write_equals_a_row_by_row_one(native, threads, dtype):
    threads(3)
    step = PagedStep(StepCase(((300, 300),), dtype=dtype, head_dim=128))
    step.bind(native)
    step.write(native, [(0, 0, 300)])
    whole = step.elements.clone()
    step.bind(native)
    for token in range(300):
        step.write(native, [(0, token, token + 1)])
    torch.testing.assert_close(step.elements, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [1, 33, 80, 128])
@pytest.mark.parametrize("extras", [{}, {"window": 20}, {"softcap": 3.0, "sinks": True}])
def test_codes_with_scales_err_as_little_as_elements(native, dtype, head_dim, extras):
    step = PagedStep(StepCase(MIXED + LONG, dtype=dtype, kv_dtype=torch.int8, head_dim=head_dim, **extras))
    expected = step.expected()
    error = (step.run(native).double() - expected).abs().max()
    assert error <= {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * expected.abs().max()
    assert torch.equal(step.run(native), step.run(native))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("window", [None, 100])
def test_of_many_requests_that_decode_each_is_as_alone(native, threads, dtype, kv_dtype, window):
    """So many that a thread takes several of their heads at once."""
    requests = tuple((1 + row % 3, 5 + 37 * row % 600) for row in range(40))
    step = PagedStep(StepCase(requests, dtype=dtype, kv_dtype=kv_dtype, window=window, group_size=2, head_dim=64))
    expected, got = step.expected(), step.run(native)
    error = (got.double() - expected).abs().max()
    assert error <= {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * expected.abs().max()
    threads(3)
    assert torch.equal(step.run(native), got)
    ends = torch.tensor([length for length, _ in requests]).cumsum(0).tolist()
    for row in (0, 7, 16, 39):
        own = slice(ends[row] - requests[row][0], ends[row])
        assert torch.equal(step.run(RawAttention(native.raw, [row]))[own], got[own]), row


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("head_dim", [33, 64])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_prompt_is_the_same_however_it_is_cut(library, dtype, kv_dtype, head_dim, window, batch_invariant):
    native = RawAttention(library.raw, batch_invariant=batch_invariant)
    total = 700
    shape = {"dtype": dtype, "kv_dtype": kv_dtype, "head_dim": head_dim, "window": window, "group_size": 3}
    whole = PagedStep(StepCase(((total, total),), **shape))
    expected = whole.run(native)
    for cut in (MAX_DRAFTS + 1, 33, 128, 300):
        cuts = PagedStep(StepCase(((cut, total),), **shape)).run(native)
        assert torch.equal(cuts, expected[total - cut :])
    few = PagedStep(StepCase(((MAX_DRAFTS, total),), **shape)).run(native)
    for cut in (1, 2, 7):
        cuts = PagedStep(StepCase(((cut, total),), **shape)).run(native)
        assert torch.equal(cuts, few[MAX_DRAFTS - cut :])
    if batch_invariant:
        assert torch.equal(few, expected[total - MAX_DRAFTS :])


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [24, 32])
@pytest.mark.parametrize("window", [None, 3])
def test_codes_that_a_query_does_not_see_may_have_no_scale(native, dtype, head_dim, window):
    requests = ((9, 20), (16, 300), (5, 5))
    step = PagedStep(StepCase(requests, dtype=dtype, kv_dtype=torch.int8, window=window, head_dim=head_dim))
    clean, start = step.run(native), 0
    for row, (_, total) in enumerate(requests):
        step.keys[row][total - 2, :, 1] = torch.inf
        step.values[row][total - 1, :, 0] = torch.nan
    out = step.run(native)
    for length, _ in requests:
        end = start + length
        assert torch.equal(out[start : end - 2], clean[start : end - 2])
        assert out[end - 2 : end].isnan().all()
        start = end


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("head_dim", [1, 5, 33, 128])
def test_codes_are_written_as_the_reference_writes_them(native, dtype, head_dim):
    cases = [PagedStep(StepCase(((40, 40),), dtype=dtype, kv_dtype=torch.int8, head_dim=head_dim)) for _ in range(2)]
    for step, backend in zip(cases, (native, TiledAttention()), strict=True):
        step.keys[0][3] = 0
        step.keys[0][4, 0, 0] = torch.inf
        step.values[0][5, 1, -1] = torch.nan
        step.bind(backend)
        step.write(backend, [(0, 0, 40)])
    rows = [step.elements.view(-1, (head_dim + 3) // 4 * 4 + 4) for step in cases]
    scales = [row[:, -4:].contiguous().view(torch.float32) for row in rows]
    torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*(row[~scales[0].isnan().squeeze(), :-4] for row in rows))


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("requests", [MIXED, ((1, 30), (1, 200)), ((64, 64),)])
@pytest.mark.parametrize("window", [None, 40])
def test_the_backend_equals_the_raw_functions(library, native, kv_dtype, requests, window):
    step = PagedStep(StepCase(requests, kv_dtype=kv_dtype, window=window, softcap=3.0, sinks=True))
    assert torch.equal(step.run(NativeAttention(library)), step.run(native))


@pytest.mark.parametrize("requests", [MIXED, ((64, 64),)])
def test_queries_of_another_dtype_than_the_cache_are_served(library, requests):
    step = PagedStep(StepCase(requests, kv_dtype=torch.bfloat16))
    error = (step.run(NativeAttention(library)).double() - step.expected()).abs().max()
    assert error <= 0.05


def test_layers_of_one_step_that_differ(library):
    """What layers have in common is set once: another layer's sizes and scale must not stay."""
    backend = NativeAttention(library)
    small, large = (
        PagedStep(StepCase(((3, 20), (1, 9)), **shape)) for shape in ({}, {"group_size": 5, "softcap": 2.0})
    )
    for step in (small, large):
        step.run(backend)
    prepared = backend.prepare(small.batch([(0, 17, 20), (1, 8, 9)]))
    query = {id(step): torch.cat([step.queries[0][17:], step.queries[1][8:]]) for step in (small, large)}
    for step in (small, large, small):
        out = backend.attend(query[id(step)], step.cache, prepared, step.params)
        torch.testing.assert_close(out.double(), step.expected(), atol=1e-5, rtol=1e-5)
