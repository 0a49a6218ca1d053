"""Latent attention against gathered keys and a plain softmax in float64; the cache's writing against indexing."""

from dataclasses import replace

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.latent_attention import LatentQueries, latent_attention, plan_latent, splits_for, write_latent

LAUNCH = InterpretedLauncher()
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALE = 0.2


class Step:
    """Requests of (query tokens, sequence length), their blocks in random order, NaN wherever no token is."""

    def __init__(self, requests, heads=4, latent=32, rope=16, block_size=16, dtype=torch.float32):
        torch.manual_seed(sum(length for _, length in requests))
        self.requests, self.latent, self.block_size = requests, latent, block_size
        self.num_tokens = sum(count for count, _ in requests)
        needs = [-(-length // block_size) for _, length in requests]
        order = torch.randperm(sum(needs) + 2)
        self.table = torch.full((len(requests), max(needs, default=0) + 2), 1 << 30, dtype=torch.int32)
        self.cache = torch.full((len(order), block_size, latent + rope), torch.nan, dtype=dtype)
        self.rows = []
        for request, (need, (_, length)) in enumerate(zip(needs, requests, strict=True)):
            blocks, order = order[:need], order[need:]
            self.table[request, :need] = blocks
            rows = torch.randn(length, latent + rope).to(dtype)
            for position in range(length):
                self.cache[blocks[position // block_size], position % block_size] = rows[position]
            self.rows.append(rows.double())
        self.queries = LatentQueries(
            torch.randn(self.num_tokens, heads, latent).to(dtype), torch.randn(self.num_tokens, heads, rope).to(dtype)
        )
        counts = torch.tensor([0] + [count for count, _ in requests])
        self.query_start = counts.cumsum(0).int()
        self.seq_lens = torch.tensor([length for _, length in requests], dtype=torch.int32)

    def plan(self):
        return plan_latent(self.query_start, self.seq_lens, self.table, self.num_tokens)

    def expected(self):
        """Return outputs and log-sum-exps, one query and head after the other."""
        query = torch.cat((self.queries.latent, self.queries.rope), 2).double()
        outs, sums, token = [], [], 0
        for (count, length), rows in zip(self.requests, self.rows, strict=True):
            for position in range(length - count, length):
                seen = rows[: position + 1]
                scores = query[token] @ seen.T * SCALE
                outs.append(scores.softmax(1) @ seen[:, : self.latent])
                sums.append(scores.logsumexp(1))
                token += 1
        return torch.stack(outs), torch.stack(sums)

    def assert_close(self, got, close=1e-5):
        out, sums = self.expected()
        torch.testing.assert_close(got.out.double(), out, rtol=close, atol=close)
        torch.testing.assert_close(got.log_sum_exp.double(), sums, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "latent", "rope"), [(1, 32, 16), (17, 64, 32), (16, 40, 8)])
@pytest.mark.parametrize("splits", [1, 3])
def test_equals_a_softmax_over_gathered_keys(dtype, heads, latent, rope, splits):
    step = Step([(1, 37), (3, 3), (2, 50), (0, 5)], heads, latent, rope, dtype=dtype)
    got = latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, splits)
    assert got.out.dtype == dtype
    assert got.log_sum_exp.dtype == torch.float32
    step.assert_close(got, CLOSE[dtype])


@pytest.mark.parametrize("splits", range(1, 9))
@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_every_number_of_parts_at_borders_of_blocks(splits, block_size):
    step = Step([(1, length) for length in (1, 15, 16, 17, 24, 25, 49)], block_size=block_size)
    step.assert_close(latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, splits))


def test_shapes_of_deepseek():
    step = Step([(1, 70), (2, 40)], heads=128, latent=512, rope=64, block_size=64, dtype=torch.bfloat16)
    step.assert_close(latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, 2), 3e-2)


def test_results_repeat_to_the_bit():
    step = Step([(1, 100), (1, 60)])
    runs = [latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, 4) for _ in range(2)]
    assert torch.equal(runs[0].out, runs[1].out)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("splits", [1, 4])
def test_nan_stays_with_its_tokens(splits):
    step = Step([(3, 20), (2, 9)])
    clean = latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, splits)
    poisoned = step.queries.latent.clone()
    poisoned[1, 0] = torch.nan
    got = latent_attention(LAUNCH, replace(step.queries, latent=poisoned), step.cache, step.plan(), SCALE, splits)
    assert got.out[1, 0].isnan().all()
    assert got.log_sum_exp[1, 0].isnan()
    assert torch.equal(got.out[1, 1:], clean.out[1, 1:])
    assert torch.equal(got.out[[0, 2, 3, 4]], clean.out[[0, 2, 3, 4]])
    # The last key of the first request: the tokens before it do not see it.
    step.cache[step.table[0, 1], 3] = torch.nan
    got = latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, splits)
    assert got.out[2].isnan().all()
    assert torch.equal(got.out[[0, 1, 3, 4]], clean.out[[0, 1, 3, 4]])


def test_large_scores_do_not_overflow():
    step = Step([(1, 40)])
    step.queries.latent.mul_(1e4)
    got = latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, 2)
    expected, _ = step.expected()
    torch.testing.assert_close(got.out.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_no_request_are_zero(splits):
    step = Step([(1, 20), (2, 5)])
    padded = LatentQueries(*(torch.cat((q, q[:2])) for q in (step.queries.latent, step.queries.rope)))
    batch = plan_latent(step.query_start, step.seq_lens, step.table, 5)
    assert batch.requests.tolist() == [0, 1, 1, 2, 2]
    assert batch.num_visible.tolist() == [20, 4, 5, 0, 0]
    got = latent_attention(LAUNCH, padded, step.cache, batch, SCALE, splits)
    assert got.out[3:].eq(0).all()
    assert got.log_sum_exp[3:].eq(-torch.inf).all()
    out, _ = step.expected()
    torch.testing.assert_close(got.out[:3].double(), out, rtol=1e-5, atol=1e-5)


def test_queries_and_caches_may_be_strided():
    step = Step([(2, 20), (1, 33)])
    fused = torch.cat((step.queries.latent.flatten(1), step.queries.rope.flatten(1)), 1)
    parts = fused.split([4 * 32, 4 * 16], 1)
    queries = LatentQueries(parts[0].unflatten(1, (4, 32)), parts[1].unflatten(1, (4, 16)))
    layers = torch.full((len(step.cache), 2, *step.cache.shape[1:]), torch.nan)
    layers[:, 1] = step.cache
    step.assert_close(latent_attention(LAUNCH, queries, layers[:, 1], step.plan(), SCALE))


def test_no_tokens():
    step = Step([])
    batch = plan_latent(step.query_start, step.seq_lens, step.table, 0)
    assert latent_attention(LAUNCH, step.queries, torch.zeros(1, 16, 48), batch, SCALE, 2).out.shape == (0, 4, 32)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_rows_are_written_where_slots_say(dtype, slot_dtype):
    layers = torch.full((5, 2, 16, 44), torch.nan).to(dtype)
    expected = layers.clone()
    source = torch.randn(70, 100).to(dtype)
    latent, rope = source[:, 3:35], source[:, 60:72]
    slots = torch.randperm(80)[:70].to(slot_dtype)
    slots[[0, 33]] = -1
    write_latent(LAUNCH, latent, rope, layers[:, 1], slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, 1, slot % 16] = torch.cat((latent[token], rope[token]))
    torch.testing.assert_close(layers, expected, rtol=0, atol=0, equal_nan=True)


def test_writing_narrows_to_the_cache_and_no_token_is_no_work():
    latent, rope, cache = torch.randn(3, 16), torch.randn(3, 8), torch.zeros(1, 4, 24, dtype=torch.bfloat16)
    write_latent(LAUNCH, latent, rope, cache, torch.tensor([2, 0, 3]))
    assert torch.equal(cache[0, [2, 0, 3]], torch.cat((latent, rope), 1).bfloat16())
    write_latent(LAUNCH, latent[:0], rope[:0], cache, torch.zeros(0, dtype=torch.int32))


def test_parts_fill_the_device_but_do_not_become_small():
    assert splits_for(num_tokens=1, num_heads=128, max_seq_len=100_000, num_processors=132) == 64
    assert splits_for(num_tokens=8, num_heads=128, max_seq_len=100_000, num_processors=132) == 9
    assert splits_for(num_tokens=8, num_heads=128, max_seq_len=1000, num_processors=132) == 3
    assert splits_for(num_tokens=512, num_heads=128, max_seq_len=100_000, num_processors=132) == 1
    assert splits_for(num_tokens=0, num_heads=16, max_seq_len=10, num_processors=132) == 1


def test_bad_arguments_are_named():
    step = Step([(1, 20)])
    with pytest.raises(ValueError, match="keys cannot be cut into 0 parts"):
        latent_attention(LAUNCH, step.queries, step.cache, step.plan(), SCALE, 0)
    with pytest.raises(ValueError, match=r"must be \[num_blocks, block_size, 48\]"):
        latent_attention(LAUNCH, step.queries, step.cache[:, :, :40], step.plan(), SCALE)
    with pytest.raises(ValueError, match="rotated query"):
        latent_attention(LAUNCH, replace(step.queries, rope=torch.zeros(1, 3, 16)), step.cache, step.plan(), SCALE)
    batch = plan_latent(step.query_start, step.seq_lens, step.table, 2)
    with pytest.raises(ValueError, match="plan it for these"):
        latent_attention(LAUNCH, step.queries, step.cache, batch, SCALE)
    with pytest.raises(ValueError, match=r"must be \[num_blocks, block_size, 32\]"):
        write_latent(LAUNCH, torch.zeros(1, 16), torch.zeros(1, 16), step.cache, torch.zeros(1))
    with pytest.raises(ValueError, match="latent is"):
        write_latent(LAUNCH, torch.zeros(2, 32), torch.zeros(1, 16), step.cache, torch.zeros(1))
