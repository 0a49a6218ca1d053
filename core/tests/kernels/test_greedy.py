"""The most likely token of each row against torch, and the rows that have none."""

import math

import pytest
import torch

from zif.kernels.greedy import greedy
from zif.kernels.interpreter import InterpretedLauncher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 33, 2048, 2049, 9001])
def test_equals_the_maximum(dtype, vocab_size):
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = greedy(InterpretedLauncher(), logits)
    assert torch.equal(got.peaks, logits.amax(dim=1).float())
    assert got.token_ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("places", [(0, 1), (31, 2048, 4096), (2047, 2048), (5000, 5001)])
def test_ties_go_to_the_lowest_id(places):
    logits = torch.full((2, 5002), -1.0)
    logits[0, list(places)] = 3.0
    got = greedy(InterpretedLauncher(), logits)
    assert got.token_ids.tolist() == [places[0], 0]


@pytest.mark.parametrize("place", [0, 100, 3000])
def test_a_nan_is_reported_for_its_row_alone(place):
    logits = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0))
    dirty = logits.clone()
    dirty[1, place] = math.nan
    clean, got = greedy(InterpretedLauncher(), logits), greedy(InterpretedLauncher(), dirty)
    assert got.peaks.isnan().tolist() == [False, True, False]
    assert got.token_ids[[0, 2]].tolist() == clean.token_ids[[0, 2]].tolist()
    assert 0 <= got.token_ids[1] < 3001


def test_rows_of_infinities_and_of_nan():
    logits = torch.zeros(4, 2500)
    logits[0], logits[1], logits[2, 2400] = -math.inf, math.nan, math.inf
    logits[3, :2499] = -math.inf
    got = greedy(InterpretedLauncher(), logits)
    assert got.token_ids.tolist() == [0, 0, 2400, 2499]
    assert str(got.peaks.tolist()) == "[-inf, nan, inf, 0.0]"


def test_rows_may_be_strided_or_missing():
    logits = torch.randn(4, 600)[:, 50:350]
    assert greedy(InterpretedLauncher(), logits).token_ids.tolist() == logits.argmax(dim=1).tolist()
    assert greedy(InterpretedLauncher(), logits[:0]).token_ids.shape == (0,)
