"""Bit masks over the vocabulary, unpacked here bit by bit."""

import math

import pytest
import torch

from zif.kernels.grammar import apply_bitmask
from zif.kernels.interpreter import InterpretedLauncher


def masked(logits, mask):
    token = torch.arange(logits.shape[1])
    allowed = (mask[:, token // 32] >> (token % 32)) & 1 == 1
    return logits.masked_fill(~allowed, -math.inf)


def random_mask(rows, vocab_size):
    words = (vocab_size + 31) // 32
    return torch.randint(-(2**31), 2**31, (rows, words), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 2048, 2049, 5000])
def test_forbidden_tokens_become_impossible(dtype, vocab_size):
    logits, mask = torch.randn(3, vocab_size).to(dtype), random_mask(3, vocab_size)
    expected = masked(logits, mask)
    apply_bitmask(InterpretedLauncher(), logits, mask)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_only_named_rows_change(dtype):
    whole, mask = torch.randn(5, 200), random_mask(2, 120)
    whole[4, 20] = math.nan
    before = whole.clone()
    apply_bitmask(InterpretedLauncher(), whole[:, 20:140], mask, torch.tensor([3, 0], dtype=dtype))
    expected = before.clone()
    expected[3:4, 20:140] = masked(before[3:4, 20:140], mask[:1])
    expected[0:1, 20:140] = masked(before[0:1, 20:140], mask[1:])
    torch.testing.assert_close(whole, expected, rtol=0, atol=0, equal_nan=True)


def test_masks_may_be_wider_than_the_vocabulary_and_none():
    logits = torch.zeros(1, 40)
    apply_bitmask(InterpretedLauncher(), logits, torch.tensor([[-1, 1, -1, -1]], dtype=torch.int32))
    assert logits[0].isfinite().sum() == 33
    apply_bitmask(InterpretedLauncher(), logits[:0], torch.zeros(0, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("mask", "rows", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), None, "give int32"),
        (torch.zeros(2, 1, dtype=torch.int32), None, "does not serve 40 tokens"),
        (torch.zeros(1, 2, dtype=torch.int32), None, "1 masks for 2 rows"),
        (torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 1]), "name one row"),
    ],
)
def test_refuses_masks_that_do_not_fit(mask, rows, message):
    with pytest.raises(ValueError, match=message):
        apply_bitmask(InterpretedLauncher(), torch.zeros(2, 40), mask, rows)
