"""Routing against the executable specification: ids exactly, also of ties and special values; weights in float64."""

import math

import pytest
import torch

from zif.contract import Routing
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.routing import route
from zif.reference.ops import ReferenceOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (2, 1), (8, 2), (33, 4), (32, 4), (128, 8), (129, 5), (512, 16), (17, 17)]
by_routing = pytest.mark.parametrize("routing", list(Routing))


def _check(logits, num_chosen, routing):
    got = route(InterpretedLauncher(), logits, num_chosen, routing)
    expected = ReferenceOps().route(logits.double(), num_chosen, routing)
    assert (got.weights.dtype, got.expert_ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(got.expert_ids, expected.expert_ids)
    torch.testing.assert_close(got.weights.double(), expected.weights, rtol=3e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@by_routing
def test_equals_the_reference(dtype, size, routing):
    torch.manual_seed(0)
    num_experts, num_chosen = size
    for num_tokens in (0, 1, 70):
        _check(torch.randn(num_tokens, num_experts).to(dtype), num_chosen, routing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [8, 33, 129, 512])
@by_routing
def test_ties_go_to_the_lowest_expert(dtype, num_experts, routing):
    torch.manual_seed(0)
    logits = torch.randint(-1, 2, (32, num_experts)).to(dtype)
    logits[::2] *= -1  # zeros of both signs
    logits[0], logits[1] = 0.0, -0.0
    _check(logits, 5, routing)


@pytest.mark.parametrize("dtype", DTYPES)
@by_routing
def test_special_values_stay_in_their_row_and_in_order(dtype, routing):
    torch.manual_seed(0)
    logits = torch.randn(8, 33).to(dtype)
    logits[0, 5] = math.nan
    logits[1, [3, 20]] = -math.nan
    logits[2] = -math.inf
    logits[3, 4:] = -math.inf
    logits[4, 9] = math.inf
    logits[5, :] = math.nan
    logits[6, 2:] = -math.inf
    _check(logits, 6, routing)


@by_routing
def test_large_logits_do_not_overflow(routing):
    logits = torch.randn(9, 33) + 2000.0 * torch.tensor([1.0, -1.0, 1.0] * 3)[:, None]
    _check(logits, 4, routing)
    _check(torch.cat((logits, torch.full((9, 1), torch.finfo(torch.float32).max)), dim=1), 4, routing)
    _check(torch.full((1, 9), torch.finfo(torch.float32).min), 4, routing)


def test_rows_may_be_strided():
    _check(torch.randn(6, 96)[:, 32:64], 4, Routing.SOFTMAX_TOPK)


def test_arguments_that_do_not_fit_are_refused():
    launch = InterpretedLauncher()
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"num_experts_per_token {count} must be from 1 to 8"):
            route(launch, torch.randn(2, 8), count, Routing.TOPK_SOFTMAX)
    with pytest.raises(ValueError, match="float64"):
        route(launch, torch.randn(2, 8).double(), 2, Routing.TOPK_SOFTMAX)
