"""The choice of tokens: against core's own, which works by other means, and where logits are no numbers."""

import numpy as np
import pytest
import torch

from zif.contract import DrawOptions
from zif.runtime.drawing import draw_tokens
from zif_cpu.operators import NativeOps


@pytest.fixture
def ops(library):
    return NativeOps(library, library.isas[-1])


def _options(num_rows, vocab_size, **fixed):
    columns = {"temperature": 1.0, "min_p": 0.0, "top_k": vocab_size, "top_p": 1.0, "fractions": 0, **fixed}
    types = {"temperature": np.float32, "min_p": np.float32, "top_k": np.int64, "top_p": np.float64}
    return DrawOptions(
        **{name: np.full(num_rows, value).astype(types.get(name, np.int64)) for name, value in columns.items()}
    )


def _mixed(num_rows, vocab_size, rng):
    return DrawOptions(
        rng.choice([0.3, 0.7, 1.0, 2.0], num_rows).astype(np.float32),
        rng.choice([0.0, 0.02, 0.3], num_rows).astype(np.float32),
        rng.choice([vocab_size, 1, 3, 50], num_rows).clip(1, vocab_size).astype(np.int64),
        rng.choice([1.0, 0.9, 0.5, 0.01, 0.0], num_rows).astype(np.float64),
        rng.integers(0, 2**62, num_rows),
    )


@pytest.mark.parametrize("vocab_size", [1, 7, 31, 100, 513, 5000, 32001])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("tied", [False, True])
def test_draws_are_those_of_core(ops, vocab_size, scale, tied):
    rng = np.random.default_rng(vocab_size)
    logits = torch.from_numpy(rng.normal(size=(9, vocab_size)).astype(np.float32) * np.float32(scale))
    if tied:
        logits = (logits * 2).round() / 2
    if vocab_size > 7:
        logits[:, 3] = -torch.inf
    options = _mixed(9, vocab_size, rng)
    chosen = ops.choose_tokens(logits, options)
    assert chosen.token_ids.tolist() == draw_tokens(logits.clone(), np.arange(9), options).tolist()
    assert torch.equal(chosen.peaks, logits.amax(1))


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 1024, 1025, 5000])
def test_greedy_takes_the_first_of_the_largest(ops, vocab_size):
    logits = torch.randint(-3, 4, (7, vocab_size), generator=torch.Generator().manual_seed(vocab_size)).float()
    chosen = ops.choose_tokens(logits, _options(7, vocab_size, temperature=0.0, fractions=2**61))
    assert chosen.token_ids.tolist() == logits.argmax(1).tolist()
    assert torch.equal(chosen.peaks, logits.amax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_what_is_no_number_shows_in_its_row_alone(ops, temperature, value, place):
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    options = _options(3, 100, temperature=temperature, fractions=2**60)
    alone = ops.choose_tokens(logits, options)
    logits[1, place] = value
    chosen = ops.choose_tokens(logits, options)
    assert not chosen.peaks[1].isfinite()
    assert chosen.peaks[1].isnan() == np.isnan(value)
    assert chosen.token_ids[[0, 2]].tolist() == alone.token_ids[[0, 2]].tolist()
    assert 0 <= int(chosen.token_ids[1]) < 100


def test_nothing_likely_is_said_by_the_peak(ops):
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 4] = 0.0
    chosen = ops.choose_tokens(logits, _options(2, 40))
    assert chosen.peaks.tolist() == [-torch.inf, 0.0]
    assert 0 <= int(chosen.token_ids[0]) < 40
    assert int(chosen.token_ids[1]) == 4


def test_rows_may_be_strided_and_logits_are_left_as_they_are(ops):
    wide = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    options = _mixed(6, 200, np.random.default_rng(5))
    before = wide.clone()
    chosen = ops.choose_tokens(wide[:, 50:250], options)
    assert chosen.token_ids.tolist() == ops.choose_tokens(wide[:, 50:250].contiguous(), options).token_ids.tolist()
    assert torch.equal(wide, before)


def test_fractions_at_both_ends_pick_tokens_that_are_kept(ops):
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -50.0]]).repeat(2, 1)
    options = _options(2, 5, top_k=3)
    options.fractions[:] = [0, 2**62 - 1]
    assert ops.choose_tokens(logits, options).token_ids.tolist() == [1, 3]
