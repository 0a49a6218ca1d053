"""The native mixture of experts with weights held as integers, for every instruction set, and what falls back."""

import pytest
import torch

from support.quantized_weights import weight_of
from zif.contract import (
    Activation,
    ExpertWeights,
    QuantizedExperts,
    QuantizedWeight,
    RouterOutput,
    Routing,
    WeightScheme,
)
from zif.reference.ops import ReferenceOps
from zif_cpu.library import DTYPE_CODES, Library, load_library
from zif_cpu.operators import NativeOps

INTEGERS = WeightScheme(8, dynamic_activations=True)
SCHEMES = (INTEGERS, WeightScheme(8), WeightScheme(8, 16, True), WeightScheme(4, 32), WeightScheme(4, 32, True))
# Tokens, channels, inner channels, experts, experts per token.
SHAPES = ((1, 64, 32, 4, 2), (5, 96, 64, 8, 3), (40, 32, 96, 6, 2), (3, 32, 32, 1, 1), (150, 64, 32, 8, 2))
REFERENCE = ReferenceOps()


class Noted(ReferenceOps):
    """The reference, noting what it serves."""

    def __init__(self):
        self.served = []

    def quantized_linear(self, *arguments):
        self.served.append("quantized_linear")
        return super().quantized_linear(*arguments)

    def quantized_experts(self, *arguments):
        self.served.append("quantized_experts")
        return super().quantized_experts(*arguments)


class Ops(NativeOps, Noted):
    def __init__(self, library, isa):
        NativeOps.__init__(self, library, isa)
        Noted.__init__(self)


@pytest.fixture
def ops(library, request):
    return Ops(library, request.node.callspec.params["library"])


@pytest.fixture
def best():
    library = load_library()
    if not isinstance(library, Library):
        pytest.skip(library)
    yield Ops(library, library.isas[-1])
    torch._dynamo.reset()


def mixture(scheme, shape, dtype, with_bias=True):
    """Make arguments, and the same weights in float64."""
    torch.manual_seed(3)
    tokens, channels, inner, experts, chosen = shape
    gate_up, wide_gate_up = weight_of(scheme, 2 * inner, channels, 1, (experts,))
    down, wide_down = weight_of(scheme, channels, inner, 2, (experts,))
    gate_up_bias = torch.randn(experts, 2 * inner).to(dtype) if with_bias else None
    down_bias = torch.randn(experts, channels).to(dtype) if with_bias else None
    x = torch.randn(tokens, channels + 2).to(dtype)[:, :channels]
    routed = REFERENCE.route(torch.randn(tokens, experts), chosen, Routing.SOFTMAX_TOPK_NORMALIZED)
    biases = [None if bias is None else bias.double() for bias in (gate_up_bias, down_bias)]
    wide = ExpertWeights(torch.from_numpy(wide_gate_up), torch.from_numpy(wide_down), *biases)
    return x, QuantizedExperts(gate_up, down, gate_up_bias, down_bias), routed, wide


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPE_CODES])
def test_as_near_to_float64_as_the_reference(ops, dtype, scheme):
    for shape in SHAPES:
        for with_bias, activation in ((False, Activation.SILU), (True, Activation.SWIGLU_CLAMPED)):
            x, weights, routed, wide = mixture(scheme, shape, dtype, with_bias)
            shares = RouterOutput(routed.weights.double(), routed.expert_ids)
            exact = REFERENCE.experts(x.double(), wide, shares, activation)
            theirs = REFERENCE.quantized_experts(x, weights, routed, activation)
            ours = ops.quantized_experts(x, weights, routed, activation)
            allowed = 2 * float((theirs.double() - exact).abs().max()) + 1e-6 * float(exact.abs().max())
            assert float((ours.double() - exact).abs().max()) <= allowed
    assert ops.served == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_token_is_the_same_alone_and_among_others(ops, scheme):
    x, weights, routed, _ = mixture(scheme, (70, 64, 96, 5, 2), torch.bfloat16)
    together = ops.quantized_experts(x, weights, routed, Activation.SILU)
    for first, count in ((0, 1), (1, 3), (20, 40)):
        part = slice(first, first + count)
        own = RouterOutput(routed.weights[part], routed.expert_ids[part])
        assert torch.equal(ops.quantized_experts(x[part], weights, own, Activation.SILU), together[part])


def test_the_order_of_choices_does_not_matter(ops):
    x, weights, routed, _ = mixture(INTEGERS, (6, 64, 32, 8, 4), torch.bfloat16)
    turned = RouterOutput(routed.weights.flip(1).contiguous(), routed.expert_ids.flip(1).contiguous())
    first = ops.quantized_experts(x, weights, routed, Activation.SILU)
    assert torch.equal(first, ops.quantized_experts(x, weights, turned, Activation.SILU))


@pytest.mark.parametrize("wrong", [-1, 8])
def test_an_expert_that_does_not_exist_is_refused(ops, wrong):
    x, weights, routed, _ = mixture(INTEGERS, (6, 64, 32, 8, 4), torch.float32)
    routed.expert_ids[-1, -1] = wrong
    with pytest.raises(ValueError, match="must be from 0 to 7"):
        ops.quantized_experts(x, weights, routed, Activation.SILU)


def test_schemes_that_have_no_kernel_are_the_references(best):
    x = torch.randn(3, 64)
    for scheme in (WeightScheme(8, 32, dynamic_activations=True), WeightScheme(8, None, True, True)):
        weight, _ = weight_of(scheme, 5, 64)
        assert torch.equal(best.quantized_linear(x, weight, None), REFERENCE.quantized_linear(x, weight, None))
        assert best.served.pop() == "quantized_linear"
    x, weights, routed, _ = mixture(WeightScheme(8, 16, dynamic_activations=True), (3, 32, 32, 4, 2), torch.float32)
    expected = REFERENCE.quantized_experts(x, weights, routed, Activation.SILU)
    torch.testing.assert_close(best.quantized_experts(x, weights, routed, Activation.SILU), expected)
    assert best.served[0] == "quantized_experts"


def test_arguments_that_do_not_fit_are_the_references(best):
    weight, _ = weight_of(WeightScheme(8), 6, 32)
    x = torch.randn(3, 32)
    scheme, codes, scales = weight.scheme, weight.codes, weight.scales
    gapped = torch.stack((codes, codes), -1)[..., 0]
    for arguments in (
        (x.double(), weight, None),
        (x[:0], weight, None),
        (x, QuantizedWeight(scheme, gapped, scales), None),
        (x, QuantizedWeight(scheme, codes, scales.double()), None),
        (torch.stack((x, x), -1)[..., 0], weight, None),
    ):
        expected = REFERENCE.quantized_linear(*arguments)
        assert torch.equal(best.quantized_linear(*arguments), expected)
        assert best.served.pop() == "quantized_linear"
    for wrong in ((x, weight, torch.randn(5)), (torch.randn(3, 31), weight, None)):
        with pytest.raises((RuntimeError, ValueError)):
            best.quantized_linear(*wrong)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_are_one_graph_that_calls_the_library(best, backend, scheme):
    weight, _ = weight_of(scheme, 33, 64)
    x, weights, routed, _ = mixture(scheme, (3, 64, 32, 4, 2), torch.bfloat16)

    def layer(x, shares, ids):
        mixed = best.quantized_experts(x, weights, RouterOutput(shares, ids), Activation.SILU)
        return best.quantized_linear(mixed, weight, None)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.inference_mode():
        assert torch.equal(
            compiled(x, *(routed.weights, routed.expert_ids)), layer(x, routed.weights, routed.expert_ids)
        )
    assert best.served == []


def test_nodes_keep_torchs_rules(best):
    weight, _ = weight_of(WeightScheme(4, 32, True), 33, 64)
    arguments = (torch.randn(3, 64), weight.codes, weight.scales, weight.zeros, [4, 32, 1, 0], None)
    node = torch.ops.zif_cpu.quantized_linear.default
    torch.library.opcheck(node, arguments, test_utils=("test_schema", "test_faketensor"))
    assert best.served == []
