"""The native mixture of experts against float64, for every instruction set."""

import ctypes

import pytest
import torch

from zif.contract import Activation, ExpertWeights, RouterOutput, Routing
from zif.reference.ops import ReferenceOps
from zif_cpu.library import ACTIVATION_CODES, DTYPE_CODES, ExpertsCall

REFERENCE = ReferenceOps()
# Tokens, channels, inner channels, experts, experts per token.
SHAPES = (
    (1, 64, 32, 4, 2),
    (5, 96, 48, 8, 3),
    (40, 33, 17, 6, 2),
    (64, 128, 80, 16, 4),
    (3, 16, 16, 1, 1),
    (150, 64, 32, 8, 2),
    (700, 1000, 40, 3, 2),
)


def _arguments(shape, dtype, with_bias):
    tokens, channels, inner, experts, chosen = shape
    x = torch.randn(tokens, channels).to(dtype)
    weights = ExpertWeights(
        (torch.randn(experts, 2 * inner, channels) / channels**0.5).to(dtype),
        (torch.randn(experts, channels, inner) / inner**0.5).to(dtype),
        torch.randn(experts, 2 * inner).to(dtype) if with_bias else None,
        torch.randn(experts, channels).to(dtype) if with_bias else None,
    )
    routed = REFERENCE.route(torch.randn(tokens, experts), chosen, Routing.SOFTMAX_TOPK_NORMALIZED)
    return x, weights, routed


def _run(library, x, weights, routed, activation):
    def at(tensor):
        return None if tensor is None else tensor.data_ptr()

    y = torch.empty_like(x)
    call = ExpertsCall(
        *(at(x), at(weights.gate_up), at(weights.gate_up_bias), at(weights.down), at(weights.down_bias)),
        *(at(routed.weights), at(routed.expert_ids), at(y), x.stride(0), *x.shape, weights.down.shape[2]),
        *(len(weights.down), routed.expert_ids.shape[1], ACTIVATION_CODES[activation]),
        DTYPE_CODES[str(x.dtype).removeprefix("torch.")],
    )
    return y, library.raw.zif_cpu_experts(ctypes.byref(call))


def _double(tensor):
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize("name", DTYPE_CODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_float64_as_the_reference(library, name, shape):
    torch.manual_seed(2)
    for with_bias, activation in ((False, Activation.SILU), (True, Activation.SWIGLU_CLAMPED)):
        x, weights, routed = _arguments(shape, getattr(torch, name), with_bias)
        wide = ExpertWeights(*(_double(part) for part in (weights.gate_up, weights.down)))
        wide = ExpertWeights(wide.gate_up, wide.down, _double(weights.gate_up_bias), _double(weights.down_bias))
        exact = REFERENCE.experts(
            x.double(), wide, RouterOutput(routed.weights.double(), routed.expert_ids), activation
        )
        y, status = _run(library, x, weights, routed, activation)
        theirs = REFERENCE.experts(x, weights, routed, activation)
        assert status == 0
        allowed = 2 * float((theirs.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
        assert float((y.double() - exact).abs().max()) <= allowed


def test_the_order_of_choices_does_not_matter(library):
    x, weights, routed = _arguments((6, 64, 32, 8, 4), torch.bfloat16, True)
    turned = RouterOutput(routed.weights.flip(1).contiguous(), routed.expert_ids.flip(1).contiguous())
    first, _ = _run(library, x, weights, routed, Activation.SILU)
    second, _ = _run(library, x, weights, turned, Activation.SILU)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", DTYPE_CODES)
def test_a_token_has_the_same_bits_in_any_batch(library, name):
    torch.manual_seed(3)
    x, weights, routed = _arguments((900, 1100, 40, 3, 2), getattr(torch, name), True)
    together, _ = _run(library, x, weights, routed, Activation.SILU)
    for first, count in ((0, 1), (5, 3), (899, 1), (100, 40), (200, 300), (1, 899)):
        rows = slice(first, first + count)
        part = RouterOutput(routed.weights[rows].contiguous(), routed.expert_ids[rows].contiguous())
        alone, _ = _run(library, x[rows], weights, part, Activation.SILU)
        assert torch.equal(alone, together[rows]), (first, count)


@pytest.mark.parametrize("wrong", [-1, 8])
def test_an_id_that_is_no_expert_is_told(library, wrong):
    x, weights, routed = _arguments((6, 64, 32, 8, 4), torch.bfloat16, False)
    routed.expert_ids[-1, -1] = wrong
    assert _run(library, x, weights, routed, Activation.SILU)[1] == -1
