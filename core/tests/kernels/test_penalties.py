"""Penalties on the device against a plain loop over the tokens of each request."""

import dataclasses
import math

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.penalties import PenaltyLists, apply_penalties


def penalized(logits, lists):
    out = logits.double().clone()
    for entry, row in enumerate(lists.rows.tolist()):
        repetition, frequency, presence = (
            column[entry].item() for column in (lists.repetition, lists.frequency, lists.presence)
        )
        for token, count in zip(lists.token_ids[entry].tolist(), lists.counts[entry].tolist(), strict=True):
            if lists.lengths[entry] <= 0 or not 0 <= token < logits.shape[1]:
                continue
            value = out[row, token].item()
            value = value / repetition if value > 0 else value * repetition
            out[row, token] = value - frequency * count - presence * (count > 0)
    return out


def lists_of(width, vocab_size, integers=torch.int64, counts=torch.float32):
    generator = torch.Generator().manual_seed(width)
    ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:width] for _ in range(2)])
    return PenaltyLists(
        torch.tensor([3, 1], dtype=integers),
        ids.to(integers),
        torch.randint(0, 4, (2, width), generator=generator).to(counts),
        torch.tensor([width, width], dtype=integers),
        torch.tensor([1.3, 0.8]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.0, -0.7]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 150])
@pytest.mark.parametrize(("integers", "counts"), [(torch.int64, torch.float32), (torch.int32, torch.int32)])
def test_equals_the_formula(dtype, width, integers, counts):
    logits = (torch.randn(5, 200, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    lists = lists_of(width, 200, integers, counts)
    expected = penalized(logits, lists).to(dtype)
    got = logits.clone()
    apply_penalties(InterpretedLauncher(), got, lists)
    torch.testing.assert_close(got, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert torch.equal(got[[0, 2, 4]], logits[[0, 2, 4]])


def test_entries_beyond_the_length_and_ids_beyond_the_vocabulary_change_nothing():
    lists = lists_of(4, 50)
    lists.token_ids[:] = torch.tensor([[7, 50, -1, 8], [1 << 40, 3, 9, 9]])
    lists.counts[:] = 2
    lists.lengths[:] = torch.tensor([3, 2])
    logits = torch.randn(5, 60)
    got = logits.clone()
    apply_penalties(InterpretedLauncher(), got[:, :50], lists)
    changed = (got != logits).nonzero().tolist()
    assert changed == [[1, 3], [3, 7]]


def test_a_nan_and_excluded_tokens_stay_what_they_are():
    logits = torch.tensor([[math.nan, -math.inf, 1.0, -1.0]])
    one = torch.ones(1)
    ids = torch.tensor([[1, 2, 3]])
    lists = PenaltyLists(torch.tensor([0]), ids, torch.zeros(1, 3), torch.tensor([3]), one * 2, one, one)
    apply_penalties(InterpretedLauncher(), logits, lists)
    assert str(logits.tolist()) == "[[nan, -inf, 0.5, -2.0]]"


def test_no_request_has_penalties():
    nothing = torch.empty(0)
    lists = PenaltyLists(nothing.long(), torch.empty(0, 3).long(), torch.empty(0, 3), *[nothing] * 4)
    apply_penalties(InterpretedLauncher(), torch.zeros(2, 9), lists)


def test_refuses_lists_of_unequal_shapes():
    lists = lists_of(4, 50)
    for name in ("counts", "lengths", "presence"):
        bad = dataclasses.replace(lists, **{name: getattr(lists, name)[:1]})
        with pytest.raises(ValueError, match=r"must be \[P, W\] twice"):
            apply_penalties(InterpretedLauncher(), torch.zeros(5, 50), bad)
