"""Log-probabilities and ranks against torch in float64."""

import math

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.logprobs import logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 40, 2048, 2049, 7001])
def test_equals_the_log_softmax(dtype, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(6, vocab_size, generator=generator) * 5).to(dtype)
    ids = torch.randint(0, vocab_size, (6,), generator=generator)
    got = logprobs(InterpretedLauncher(), logits, ids)
    wide, own = logits.double(), ids[:, None]
    expected = wide.log_softmax(dim=1).gather(1, own).squeeze(1)
    torch.testing.assert_close(got.logprobs.double(), expected, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(got.normalizers.double(), wide.logsumexp(dim=1), rtol=2e-6, atol=2e-6)
    assert got.ranks.tolist() == ((wide > wide.gather(1, own)).sum(dim=1) + 1).tolist()


def test_large_logits_do_not_overflow_and_ties_share_a_rank():
    logits = torch.full((2, 4000), 1e4)
    logits[1], logits[1, 3999] = -1e4, 1e4
    got = logprobs(InterpretedLauncher(), logits, torch.tensor([3000, 17], dtype=torch.int32))
    torch.testing.assert_close(got.logprobs, torch.tensor([-math.log(4000), -2e4]), rtol=1e-6, atol=1e-3)
    assert got.ranks.tolist() == [1, 2]


def test_special_values_are_those_of_torch():
    logits = torch.zeros(6, 5000)
    logits[0, :4999] = -math.inf  # whole chunks of -inf
    logits[1] = -math.inf
    logits[2, 3], logits[3, 4999] = math.inf, math.nan
    logits[4, :2048] = -math.inf
    logits[4, 2048:] = -200.0
    ids = torch.tensor([4999, 0, 3, 0, 4999, 1])
    got = logprobs(InterpretedLauncher(), logits, ids)
    normalizers = logits.logsumexp(dim=1)
    expected = logits.gather(1, ids[:, None]).squeeze(1) - normalizers
    torch.testing.assert_close(got.normalizers, normalizers, equal_nan=True)
    torch.testing.assert_close(got.logprobs, expected, equal_nan=True)
    assert got.logprobs[[0, 5]].isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(5, 3000)[:, 100:2900]
    ids = torch.arange(5) * 100
    together = logprobs(InterpretedLauncher(), logits, ids)
    alone = logprobs(InterpretedLauncher(), logits[3:4], ids[3:4])
    assert torch.equal(together.logprobs[3:4], alone.logprobs)
    assert logprobs(InterpretedLauncher(), logits[:0], ids[:0]).ranks.shape == (0,)


def test_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match=r"token_ids of \(3,\) must be one per row"):
        logprobs(InterpretedLauncher(), torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))
