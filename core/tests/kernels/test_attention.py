"""Paged attention by kernels against the reference in float64, request by request."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from zif.contract import AttentionBatch, AttentionParams, FullAttentionSpec, KVArena, KVGroup, SlidingWindowSpec
from zif.kernels.attention import PagedAttention
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.launch import Recorder
from zif.kernels.paged_calls import AttentionCall, Extras, PagedCache, paged_attention, write_kv
from zif.kernels.tuning import INTERPRETER_FOLDER, LaunchConfig, Tuning
from zif.reference.attention import ReferenceAttention

CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYERS, LAYER = (0, 1), 1


class SplitTuning(Tuning):
    """Small tiles, and as many splits as `programs` give."""

    def __init__(self, programs=1, block_n=16, block_m=16):
        self._programs, self._block_n, self._block_m = programs, block_n, block_m
        self._others = Tuning.read(INTERPRETER_FOLDER)

    def config(self, kernel, **quantities):
        if kernel != "paged_attention":
            return self._others.config(kernel, **quantities)
        tiles = {"BLOCK_M": self._block_m, "BLOCK_N": self._block_n, "PROGRAMS": self._programs}
        return LaunchConfig(tuple(tiles.items()))


class Case:
    """Requests as (new tokens, known tokens), their cache filled with NaN where nobody may look."""

    def __init__(self, requests, *, heads=(4, 2), head_dim=32, block_size=16, window=None, dtype=torch.float32):
        self.requests, self.dtype, self.window = requests, dtype, window
        self.num_heads, self.num_kv_heads = heads
        self.head_dim, self.block_size = head_dim, block_size
        self.rng = np.random.default_rng(1)
        torch.manual_seed(1)
        self.lengths = [length for _, length in requests]
        need = [-(-length // block_size) for length in self.lengths]
        self.num_blocks = sum(need) + 3
        ids = self.rng.permutation(np.arange(1, self.num_blocks)).tolist()
        self.table = np.full((len(requests), max(need) + 1), 10**6, np.int32)  # entries not in use are wild
        for row, count in enumerate(need):
            self.table[row, :count] = [ids.pop() for _ in range(count)]
        shape = sum(self.lengths), self.num_kv_heads, head_dim
        self.key, self.value = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        total = sum(new for new, _ in requests)
        fused = torch.randn(total, (self.num_heads + 2) * head_dim, dtype=dtype)
        self.query = fused[:, : self.num_heads * head_dim].view(total, self.num_heads, head_dim)

    def spec(self):
        name = str(self.dtype).removeprefix("torch.")
        sizes = LAYERS, self.num_kv_heads, self.head_dim, self.block_size, name
        return FullAttentionSpec(*sizes) if self.window is None else SlidingWindowSpec(*sizes, window=self.window)

    def batch(self, *, whole):
        spans = [(length, length) for length in self.lengths] if whole else self.requests
        starts = np.concatenate(([0], np.cumsum([new for new, _ in spans]))).astype(np.int32)
        slots = []
        for row, (new, length) in enumerate(spans):
            places = np.arange(length - new, length)
            slots.append(self.table[row, places // self.block_size].astype(np.int64) * self.block_size)
            slots[-1] += places % self.block_size
        seq_lens = np.array(self.lengths, np.int32)
        return AttentionBatch(starts, seq_lens, self.table, np.concatenate(slots), self.block_size, self.window)

    def run(self, backend, params, *, writes_again=True):
        """Write everything, then the step's own tokens again, as a layer does before it attends."""
        spec = self.spec()
        group = KVGroup(spec, backend.kv_layout(spec))
        arena = KVArena(group.layout.block_bytes, self.num_blocks, (group,))
        memory = torch.full((arena.num_bytes // self.dtype.itemsize,), torch.nan, dtype=self.dtype)
        cache = backend.bind(arena, 0, memory.view(torch.uint8))[LAYER]
        backend.write(self.key, self.value, cache, backend.prepare(self.batch(whole=True)))
        prepared = backend.prepare(self.batch(whole=False))
        if writes_again:
            ends = np.cumsum(self.lengths)
            rows = np.concatenate([np.arange(e - new, e) for e, (new, _) in zip(ends, self.requests, strict=True)])
            backend.write(self.key[rows], self.value[rows], cache, prepared)
        return backend.attend(self.query, cache, prepared, params)

    def expected(self, params):
        wide = replace_dtype(self, torch.float64)
        sinks = None if params.sinks is None else params.sinks.double()
        return wide.run(ReferenceAttention(), replace(params, sinks=sinks))


def replace_dtype(case, dtype):
    wide = object.__new__(Case)
    wide.__dict__.update(case.__dict__, dtype=dtype)
    wide.key, wide.value, wide.query = case.key.to(dtype), case.value.to(dtype), case.query.to(dtype)
    return wide


def check(case, params, launch=None):
    got = case.run(PagedAttention(launch or InterpretedLauncher(), "cpu"), params)
    assert got.dtype == case.dtype
    torch.testing.assert_close(got.double(), case.expected(params), atol=CLOSE[case.dtype], rtol=CLOSE[case.dtype])


MIXED = [(1, 40), (7, 23), (1, 1), (16, 16), (1, 17), (12, 33)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (5, 1)])
def test_mixed_batch(dtype, heads):
    check(Case(MIXED, heads=heads, dtype=dtype), AttentionParams(scale=0.2))


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256, 512])
def test_head_sizes(head_dim):
    check(Case([(1, 19), (9, 20)], head_dim=head_dim), AttentionParams(scale=head_dim**-0.5))


@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
def test_block_sizes(block_size):
    check(Case(MIXED, block_size=block_size), AttentionParams(scale=0.2))


@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("programs", [1, 64])
def test_windows(window, programs):
    launch = InterpretedLauncher(SplitTuning(programs))
    check(Case([*MIXED, (1, 300)], window=window), AttentionParams(scale=0.2, window=window), launch)


def test_soft_cap_and_sinks():
    case = Case(MIXED)
    sinks = torch.randn(4)
    check(case, AttentionParams(scale=3.0, softcap=5.0))
    check(case, AttentionParams(scale=0.2, sinks=sinks))
    check(case, AttentionParams(scale=0.2, softcap=2.0, sinks=sinks), InterpretedLauncher(SplitTuning(64)))


@pytest.mark.parametrize("lengths", [(600,), (515, 3), (1, 512, 513), (2000, 256)])
@pytest.mark.parametrize("programs", [1, 8, 64])
def test_splits_of_long_rows(lengths, programs):
    case = Case([(1, length) for length in lengths])
    check(case, AttentionParams(scale=0.2), InterpretedLauncher(SplitTuning(programs, block_n=64)))


class DenseTuning(SplitTuning):
    """Prompts of `shortest` tokens and more go to the array library."""

    def __init__(self, shortest):
        super().__init__()
        self._shortest = shortest

    def config(self, kernel, **quantities):
        if kernel == "dense_prefill":
            return LaunchConfig((("MIN_QUERIES", self._shortest),))
        return super().config(kernel, **quantities)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_whole_prompts_of_the_array_library(heads):
    requests = [(20, 20), (20, 20), (1, 9), (30, 30), (16, 40), (12, 12), (20, 20)]
    case, launch = Case(requests, heads=heads, dtype=torch.bfloat16), InterpretedLauncher(DenseTuning(16))
    spans = PagedAttention(launch, "cpu").prepare(case.batch(whole=False)).dense
    assert [(span.first, span.last, span.count) for span in spans] == [(0, 40, 2), (41, 71, 1), (99, 119, 1)]
    for params in (AttentionParams(scale=0.2), AttentionParams(scale=0.2, softcap=2.0)):
        got = case.run(PagedAttention(launch, "cpu"), params)
        torch.testing.assert_close(got.double(), case.expected(params), atol=2e-2, rtol=2e-2)


def test_one_key_carries_the_answer():
    case = Case([(1, 700), (3, 90)])
    case.key.zero_()
    case.value.zero_()
    case.query.fill_(1.0)
    for place in (5, 700 + 88):
        case.key[place], case.value[place] = 40.0, 7.0
    out = case.run(PagedAttention(InterpretedLauncher(SplitTuning(64)), "cpu"), AttentionParams(scale=1.0))
    assert (out[0] == 7.0).all()
    assert (out[1] == 0.0).all(), "the query before the needle must not see it"
    assert (out[2:] == 7.0).all()


def test_a_nan_stays_in_its_request():
    case = Case(MIXED)
    clean = case.run(PagedAttention(InterpretedLauncher(), "cpu"), AttentionParams(scale=0.2))
    case.key[40:63] = torch.nan
    dirty = case.run(PagedAttention(InterpretedLauncher(), "cpu"), AttentionParams(scale=0.2))
    assert torch.equal(dirty[:1], clean[:1])
    assert torch.equal(dirty[8:], clean[8:])
    assert dirty[1:8].isnan().all()


class TestBuckets:
    def test_a_padded_step_keeps_its_buffers(self):
        backend = PagedAttention(InterpretedLauncher(), "cpu")
        first = backend.prepare(Case([(1, 20), (1, 3), (1, 9)]).batch(whole=False))
        second = backend.prepare(Case([(1, 40), (1, 30), (1, 19), (1, 7)]).batch(whole=False))
        assert first is second
        assert second.bucket == 4
        assert second.arrays.seq_lens.tolist() == [40, 30, 19, 7]

    def test_groups_do_not_share_buffers(self):
        backend = PagedAttention(InterpretedLauncher(), "cpu")
        batch = Case([(1, 20)]).batch(whole=False)
        assert backend.prepare(batch) is not backend.prepare(replace(batch, group=1))

    def test_a_table_that_grows_moves(self):
        backend = PagedAttention(InterpretedLauncher(), "cpu")
        first = backend.prepare(Case([(1, 20)]).batch(whole=False))
        second = backend.prepare(Case([(1, 1200)]).batch(whole=False))
        assert first is not second

    def test_what_pads_writes_and_reads_nothing(self):
        case = Case([(1, 20), (1, 3), (1, 9)])
        check(case, AttentionParams(scale=0.2), InterpretedLauncher(SplitTuning(64)))


def test_results_do_not_depend_on_the_batch_where_that_is_asked():
    alone, others = [(1, 1100)], [(5, 60), (1, 3), (40, 40)]
    case = Case(alone + others)
    launch = InterpretedLauncher(SplitTuning(64, block_n=64))
    together = case.run(PagedAttention(launch, "cpu", batch_invariant=True), AttentionParams(scale=0.2))
    single = object.__new__(Case)
    single.__dict__.update(case.__dict__, requests=alone, lengths=[1100], table=case.table[:1])
    single.key, single.value, single.query = case.key[:1100], case.value[:1100], case.query[:1]
    apart = single.run(PagedAttention(launch, "cpu", batch_invariant=True), AttentionParams(scale=0.2))
    assert torch.equal(together[:1], apart)
    torch.testing.assert_close(together.double(), case.expected(AttentionParams(scale=0.2)), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("window", [1, 7, 500, 511, 512, 1023])
def test_windows_do_not_lose_keys_where_results_do_not_depend_on_the_batch(window):
    case = Case([(1, 1500), (3, 700)], window=window)
    launch, params = InterpretedLauncher(SplitTuning(block_n=64)), AttentionParams(scale=0.2, window=window)
    got = case.run(PagedAttention(launch, "cpu", batch_invariant=True), params)
    torch.testing.assert_close(got.double(), case.expected(params), atol=3e-6, rtol=3e-6)


def test_a_step_is_compiled_for_few_kinds_of_arguments():
    """What the compiler makes a kernel of its own for must not follow the numbers of a step."""
    recorder = Recorder(Tuning.read())
    rng = np.random.default_rng(0)
    for _ in range(60):
        requests = [(1, int(rng.integers(1, 5000))) for _ in range(rng.integers(1, 40))]
        requests += [(int(n), int(n)) for n in rng.integers(2, 60, rng.integers(0, 4))]
        case = Case(requests, heads=(8, 2), dtype=torch.bfloat16)
        backend = PagedAttention(recorder, "cpu")
        prepared = backend.prepare(case.batch(whole=False))
        part = 2 * 16 * 32
        cache = PagedCache(
            torch.empty(part, dtype=torch.bfloat16), torch.empty(part, dtype=torch.bfloat16), part, 2, 16, 32
        )
        backend.write(case.query[:, :2], case.query[:, :2], cache, prepared)
        backend.attend(case.query, cache, prepared, AttentionParams(scale=0.2))
    counts = Counter(found.name for found in recorder.recorded)
    assert counts["write_kv"] <= 2
    assert counts["paged_attention"] <= 12
    assert counts["merge_splits"] <= 14


class TestExtras:
    """What the kernels know beyond the contract."""

    def attend(self, case, params, extras, dtype=None, scales=None):
        launch = InterpretedLauncher(SplitTuning(8))
        backend = PagedAttention(launch, "cpu")
        shape = case.num_blocks, case.num_kv_heads, case.block_size, case.head_dim
        keys, values = (torch.zeros(shape, dtype=dtype or case.dtype) for _ in range(2))
        sizes = shape[1] * shape[2] * shape[3], case.num_kv_heads, case.block_size, case.head_dim
        cache = PagedCache(keys.view(-1), values.view(-1), *sizes, scales)
        write_kv(launch, case.key, case.value, cache, backend.prepare(case.batch(whole=True)).arrays.slots)
        step = backend.prepare(case.batch(whole=False))
        return paged_attention(launch, case.query, cache, step, AttentionCall(params, extras)), cache

    def scores(self, case, row, slopes=None):
        """Return the scores of a request's last query, [H, S], float64, and its values [H, S, D]."""
        first = sum(case.lengths[:row])
        span = slice(first, first + case.lengths[row])
        repeat = case.num_heads // case.num_kv_heads
        key, value = (x[span].double().repeat_interleave(repeat, 1) for x in (case.key, case.value))
        last = sum(new for new, _ in case.requests[: row + 1]) - 1
        scores = torch.einsum("hd,shd->hs", case.query[last].double(), key) * 0.2
        if slopes is not None:
            distance = torch.arange(case.lengths[row]) - (case.lengths[row] - 1)
            scores += slopes.double()[:, None] * distance
        return last, scores, value.transpose(0, 1)

    def test_log_sum_exp(self):
        case = Case([(1, 700), (5, 40), (12, 12)])
        lse = torch.zeros(18, 4)
        self.attend(case, AttentionParams(scale=0.2), Extras(lse=lse))
        for row in range(3):
            last, scores, _ = self.scores(case, row)
            torch.testing.assert_close(lse[last].double(), scores.logsumexp(-1), atol=2e-6, rtol=2e-6)

    def test_alibi(self):
        case = Case([(1, 600), (5, 40), (12, 12)])
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
        out, _ = self.attend(case, AttentionParams(scale=0.2), Extras(slopes=slopes))
        for row in range(3):
            last, scores, values = self.scores(case, row, slopes)
            expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
            torch.testing.assert_close(out[last].double(), expected, atol=3e-6, rtol=3e-6)

    def test_without_causality_every_query_sees_its_whole_request(self):
        case = Case([(7, 7), (20, 20)])
        out, _ = self.attend(case, AttentionParams(scale=0.2), Extras(causal=False))
        for row, first in enumerate((0, 7)):
            case.query[sum(case.lengths[: row + 1]) - 1] = case.query[first]
            _, scores, values = self.scores(case, row)
            expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), values)
            torch.testing.assert_close(out[first].double(), expected, atol=3e-6, rtol=3e-6)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8])
    def test_narrow_caches(self, dtype):
        case = Case([(1, 300), (5, 40)], dtype=torch.bfloat16)
        scales = torch.tensor([0.04, 0.03] if dtype == torch.int8 else [0.5, 0.25])
        out, cache = self.attend(case, AttentionParams(scale=0.2), Extras(), dtype, scales)
        slots = case.batch(whole=True).slots
        for stored, given, scale in ((cache.keys, case.key, scales[0]), (cache.values, case.value, scales[1])):
            wanted = given.float() / scale
            limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
            wanted = wanted.clamp(-limit, limit)
            wanted = (wanted.round() if dtype == torch.int8 else wanted).to(dtype).float()
            tokens = stored.view(case.num_blocks, case.num_kv_heads, case.block_size, -1).transpose(1, 2).flatten(0, 1)
            assert torch.equal(tokens[torch.from_numpy(slots)].float(), wanted)
            given.copy_(wanted * scale)
        expected = case.expected(AttentionParams(scale=0.2))
        torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)

    def test_heads_that_do_not_fit(self):
        case = Case([(1, 20)], heads=(5, 2))
        with pytest.raises(ValueError, match="5 query heads are no multiple of 2 KV heads"):
            self.attend(case, AttentionParams(scale=0.2), Extras())


def test_slots_of_minus_one_and_neighbours_are_not_written():
    keys, values = torch.zeros(4 * 2 * 16 * 32), torch.zeros(4 * 2 * 16 * 32)
    cache = PagedCache(keys, values, 2 * 16 * 32, 2, 16, 32)
    write_kv(InterpretedLauncher(), torch.ones(3, 2, 32), torch.ones(3, 2, 32), cache, torch.tensor([5, -1, 63]))
    by_token = keys.view(4, 2, 16, 32).transpose(1, 2).reshape(64, 64)
    assert by_token.sum(1).nonzero().flatten().tolist() == [5, 63]
    assert keys.sum() == values.sum() == 2 * 64
