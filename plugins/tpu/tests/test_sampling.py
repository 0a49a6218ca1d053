"""Drawing in a program of static shape equals core's drawing, token by token."""

import numpy as np
import pytest
import torch

from zif.runtime import DrawOptions
from zif.runtime.drawing import draw_tokens
from zif_tpu.sampling import Choice, Places, choose


def _options(rows, vocab_size, **changes):
    generator = np.random.default_rng(3)
    columns = {
        "temperature": np.full(rows, 0.8, dtype=np.float32),
        "min_p": np.zeros(rows, dtype=np.float32),
        "top_k": np.full(rows, vocab_size, dtype=np.int64),
        "top_p": np.ones(rows),
        "fractions": generator.integers(0, 2**62, rows),
    }
    return DrawOptions(**{**columns, **changes})


@pytest.mark.parametrize("vocab_size", [1, 2, 511, 512, 513, 3000])
@pytest.mark.parametrize("filters", ["none", "min_p", "top_k", "top_p", "all"])
def test_draws_are_those_of_core(vocab_size, filters):
    rows, chance = 64, np.random.default_rng(vocab_size)
    changes = {}
    if filters in ("min_p", "all"):
        changes["min_p"] = chance.choice([0.0, 0.05, 0.5, 1.0], rows).astype(np.float32)
    if filters in ("top_k", "all"):
        changes["top_k"] = np.minimum(chance.choice([1, 3, 50, 10**6], rows), vocab_size)
    if filters in ("top_p", "all"):
        changes["top_p"] = chance.choice([1e-9, 0.3, 0.9, 0.999, 1.0], rows)
    options = _options(rows, vocab_size, **changes)
    logits = torch.from_numpy(chance.normal(0, 3, (rows, vocab_size)).astype(np.float32))
    expected = draw_tokens(logits.clone(), np.arange(rows), options)
    places = Places.of(rows, rows, (np.ones(rows, dtype=np.bool_), options))
    got = choose(logits, torch.from_numpy(places.integers), torch.from_numpy(places.reals), Choice.DRAWN)
    assert got[:, 0].long().tolist() == expected.tolist()


def test_greedy_places_beside_drawn_ones():
    logits = torch.tensor([[0.0, 5.0, 5.0], [0.0, 0.0, 9.0]])
    places = Places.of(4, 2, (np.array([False, True]), _options(1, 3)))
    got = choose(logits[[0, 1, 0, 0]], torch.from_numpy(places.integers), torch.from_numpy(places.reals), Choice.OPEN)
    assert got.shape == (4, 5)
    assert got[:2, :2].tolist() == [[1.0, 5.0], [2.0, 9.0]]
    assert torch.equal(got[:2, 2:], logits)


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf])
def test_a_spoilt_row_shows_in_its_peak_alone(spoilt):
    logits = torch.zeros(2, 8)
    logits[0, 3] = spoilt
    places = Places.of(2, 2)
    got = choose(logits, torch.from_numpy(places.integers), torch.from_numpy(places.reals), Choice.GREEDY)
    assert not got[0, 1].isfinite()
    assert got[1].tolist() == [0.0, 0.0]
