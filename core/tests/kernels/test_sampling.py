"""Tokens drawn on a device against those that core draws from the same fractions."""

import math

import numpy as np
import pytest
import torch

from zif.kernels.drawing import DrawingRows, keep_likely, survey
from zif.kernels.greedy import greedy
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.sampling import SamplingColumns, draw_fractions, sample
from zif.runtime import randomness
from zif.runtime.drawing import DrawOptions, draw_tokens

KEPT = 1024
"""As many tokens the interpreter's tuning keeps; a row with more goes another way."""


def columns(rows, fractions, temperature=1.0, min_p=0.0, top_k=1 << 40, top_p=1.0):
    def full(value, dtype):
        return torch.full((rows,), value, dtype=dtype)

    return SamplingColumns(
        full(temperature, torch.float32),
        full(min_p, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float64),
        torch.as_tensor(fractions),
    )


def drawn_by_core(logits, options):
    names = ("temperature", "min_p", "top_k", "top_p", "fractions")
    rows = np.arange(len(logits))
    return draw_tokens(logits.float().clone(), rows, DrawOptions(*(getattr(options, name).numpy() for name in names)))


def rows_of(logits, options):
    return DrawingRows(logits, greedy(InterpretedLauncher(), logits), options)


def fractions_of(rows, seed=0):
    states = np.array([randomness.stream_state(seed + row) for row in range(rows)])
    return randomness.draw_fractions(states, np.arange(rows))


def peaked(rows, vocab_size, scale=4.0, seed=0):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS = {
    "none": {},
    "cold": {"temperature": 0.01},
    "hot": {"temperature": 5.0},
    "min_p": {"min_p": 0.05},
    "one": {"top_k": 1},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "tiny top_p": {"top_p": 1e-9},
    "both": {"top_k": 50, "top_p": 0.8, "temperature": 0.7},
    "all": {"top_k": 100, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
}


@pytest.mark.parametrize("vocab_size", [1, 100, 2049, 5003])
@pytest.mark.parametrize("filters", FILTERS)
def test_draws_the_tokens_of_core(vocab_size, filters):
    logits = peaked(4, vocab_size)
    options = columns(4, fractions_of(4), **FILTERS[filters])
    got = sample(InterpretedLauncher(), logits, options)
    assert got.token_ids.tolist() == drawn_by_core(logits, options).tolist()
    assert torch.equal(got.peaks, logits.amax(dim=1))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_p": 0.999},
        {"top_k": 1500},
        {"top_k": 1200, "top_p": 0.99, "min_p": 0.1},
        {"top_k": 2500, "min_p": 0.5},
        {"top_p": 1 - 2**-40},
    ],
)
def test_draws_from_a_flat_row_of_which_too_many_tokens_pass(filters):
    logits = peaked(2, 3001, scale=0.3)
    scores = logits[0].sort(descending=True).values.softmax(0).cumsum(0)
    passing = min(filters.get("top_k", 3001), int((scores < filters.get("top_p", 1)).sum()))
    assert passing > KEPT, "otherwise this test does not go over the whole row"
    options = columns(2, fractions_of(2), **filters)
    got = sample(InterpretedLauncher(), logits, options).token_ids
    assert got.tolist() == drawn_by_core(logits, options).tolist()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_best_tokens_that_share_their_group_are_kept(share):
    # Groups are strided by 256 here: the best of each group alone do not hold the nucleus.
    logits = torch.full((3, 4096), -30.0)
    logits[:, 7:2048:256] = 10.0 - torch.arange(8) / 10
    options = columns(3, fractions_of(3), top_p=share)
    assert sample(InterpretedLauncher(), logits, options).token_ids.tolist() == drawn_by_core(logits, options).tolist()


@pytest.mark.parametrize(
    ("filters", "fewest", "most"),
    [({"top_k": 40}, 40, 45), ({"top_p": 0.9}, 10, 200), ({"top_k": 40, "top_p": 0.5}, 40, 45)],
)
def test_few_more_tokens_are_kept_than_pass(filters, fewest, most):
    rows = rows_of(peaked(3, 20000), columns(3, fractions_of(3), **filters))
    surveyed = survey(InterpretedLauncher(), rows)
    counts = keep_likely(InterpretedLauncher(), rows, surveyed).counts
    assert (counts >= fewest).all()
    assert (counts <= most).all()


def test_light_tokens_are_left_out_where_groups_do_not_show_the_nucleus():
    logits = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0)) - 30
    logits[:, 7:2048:256] = 10.0
    rows = rows_of(logits, columns(1, fractions_of(1), top_p=0.9))
    kept = keep_likely(InterpretedLauncher(), rows, survey(InterpretedLauncher(), rows))
    assert kept.counts.tolist() == [[8]]
    assert kept.ids[0, :8].tolist() == list(range(7, 2048, 256))


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_tie_at_the_border_stay_together(filters, dtype):
    logits = torch.randint(0, 4, (12, 300), generator=torch.Generator().manual_seed(1)).to(dtype)
    options = columns(12, fractions_of(12), **filters)
    got = sample(InterpretedLauncher(), logits, options).token_ids
    assert got.tolist() == drawn_by_core(logits, options).tolist()


def test_rows_have_options_of_their_own_and_do_not_depend_on_each_other():
    logits = peaked(12, 2500)
    options = SamplingColumns(
        torch.tensor([0.0, 0.5, 1.0, 2.0] * 3),
        torch.tensor([0.0, 0.0, 0.1] * 4),
        torch.tensor([1, 20, 2500, 1 << 40, 2] * 2 + [7, 2500]),
        torch.tensor([1.0, 0.9, 0.5] * 4, dtype=torch.float64),
        torch.from_numpy(fractions_of(12)),
    )
    together = sample(InterpretedLauncher(), logits, options).token_ids
    warm = options.temperature > 0
    safe = SamplingColumns(
        options.temperature.clamp(min=0.5), *(getattr(options, n) for n in SamplingColumns.__slots__[1:])
    )
    assert together[warm].tolist() == drawn_by_core(logits, safe)[warm].tolist()
    assert together[~warm].tolist() == logits[~warm].argmax(1).tolist()
    for row in (0, 5, 11):
        alone = SamplingColumns(*(getattr(options, name)[row : row + 1] for name in SamplingColumns.__slots__))
        assert sample(InterpretedLauncher(), logits[row : row + 1], alone).token_ids.item() == together[row]


def test_the_last_fraction_draws_the_last_likely_token_and_the_first_the_first():
    # None in the first and the last 2048: tiles without weight.
    logits = torch.full((2, 9000), -math.inf)
    logits[:, [2500, 2501, 4800]] = torch.tensor([1.0, 1.0, 0.0])
    for filters in ({}, {"top_k": 3}, {"top_p": 0.99}):
        options = columns(2, [0, 2**62 - 1], **filters)
        assert sample(InterpretedLauncher(), logits, options).token_ids.tolist() == [2500, 4800]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_a_row_without_a_finite_peak_is_reported_and_leaves_the_others(filters):
    logits = peaked(5, 700)
    options = columns(5, fractions_of(5), **filters)
    clean = sample(InterpretedLauncher(), logits, options).token_ids
    dirty = logits.clone()
    dirty[1, 650], dirty[2], dirty[3, 4] = math.nan, -math.inf, math.inf
    got = sample(InterpretedLauncher(), dirty, options)
    assert got.peaks.isfinite().tolist() == [True, False, False, False, True]
    assert str(got.peaks[1:4].tolist()) == "[nan, -inf, inf]"
    assert got.token_ids[[0, 4]].tolist() == clean[[0, 4]].tolist()
    assert (got.token_ids >= 0).all()
    assert (got.token_ids < 700).all()


def test_excluded_tokens_are_never_drawn():
    logits = torch.zeros(12, 130)
    logits[:, ::2] = -math.inf
    for filters in ({}, {"top_k": 100}, {"top_p": 0.9}):
        options = columns(12, fractions_of(12), **filters)
        got = sample(InterpretedLauncher(), logits, options).token_ids
        assert (got % 2 == 1).all()
        assert got.tolist() == drawn_by_core(logits, options).tolist()


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(100, 4).contiguous()
    got = sample(InterpretedLauncher(), logits, columns(100, np.arange(100) * (2**62 // 100))).token_ids
    assert (torch.bincount(got, minlength=4) - torch.tensor([50, 20, 20, 10])).abs().max() <= 1


def test_logits_are_left_and_may_be_strided():
    wide = peaked(3, 900)
    before, options = wide.clone(), columns(3, fractions_of(3), top_k=20)
    got = sample(InterpretedLauncher(), wide[:, 100:500], options).token_ids
    assert got.tolist() == drawn_by_core(wide[:, 100:500], options).tolist()
    assert torch.equal(wide, before)


def test_no_rows():
    got = sample(InterpretedLauncher(), torch.empty(0, 50), columns(0, torch.empty(0, dtype=torch.int64)))
    assert got.token_ids.shape == (0,)


def test_fractions_are_those_of_core():
    states = np.array(
        [0, 1, 2**63, 2**64 - 1] + [randomness.stream_state(seed) for seed in range(300)], dtype=np.uint64
    )
    positions = np.concatenate([np.array([0, 1, 2**40, 2**62]), np.arange(300)])
    got = draw_fractions(InterpretedLauncher(), torch.from_numpy(states.view(np.int64)), torch.from_numpy(positions))
    assert got.tolist() == randomness.draw_fractions(states, positions).tolist()


@pytest.mark.parametrize("name", ["temperature", "min_p", "top_k", "top_p", "fractions"])
def test_refuses_an_option_of_another_dtype_or_length(name):
    good = columns(2, fractions_of(2))
    for bad in (getattr(good, name).to(torch.float16), getattr(good, name)[:1]):
        options = SamplingColumns(*(bad if n == name else getattr(good, n) for n in SamplingColumns.__slots__))
        with pytest.raises(ValueError, match=f"{name} is .* give"):
            sample(InterpretedLauncher(), peaked(2, 10), options)
