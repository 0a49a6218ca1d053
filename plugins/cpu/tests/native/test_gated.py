"""Gated products of the native library: to the bit what its product and then its gated activation give."""

import pytest
import torch

from zif.contract import Activation, QuantizedWeight, WeightScheme
from zif.reference.ops import ReferenceOps
from zif_cpu.library import DTYPE_CODES
from zif_cpu.operators import NativeOps

# Tokens, inputs, inner: borders of vectors, tiles and parts, none of their multiples, many tokens and many outputs.
SHAPES = (
    *((1, 1, 1), (1, 64, 16), (2, 31, 5), (3, 96, 33), (8, 80, 64), (16, 32, 17), (17, 260, 31), (33, 128, 100)),
    *((64, 96, 65), (130, 64, 300), (400, 256, 96), (1030, 160, 40), (40, 1024, 2100), (515, 4096, 33)),
)
SCHEMES = {
    "w8a8": WeightScheme(8, dynamic_activations=True),
    "w8a16": WeightScheme(8),
    "w4a16": WeightScheme(4, 32),
}


@pytest.fixture
def ops(library, request):
    return NativeOps(library, request.node.callspec.params["library"], batch_invariant=True)


def drawn(dtype, tokens, inputs, inner):
    """Return x with a strided first axis, a weight of gates and ups, and their bias."""
    x = torch.randn(tokens, inputs + 3).to(dtype)[:, :inputs]
    return x, (torch.randn(2 * inner, inputs) * inputs**-0.5).to(dtype), torch.randn(2 * inner).to(dtype)


@pytest.mark.parametrize("name", DTYPE_CODES)
@pytest.mark.parametrize("activation", list(Activation))
def test_products_of_numbers(ops, name, activation):
    torch.manual_seed(1)
    for shape in SHAPES:
        x, weight, bias = drawn(getattr(torch, name), *shape)
        for own in (None, bias):
            want = ops.gated_activation(ops.linear(x, weight, own), activation)
            assert torch.equal(ops.gated_linear(x, weight, own, activation), want), shape


@pytest.mark.parametrize("name", DTYPE_CODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_of_codes(ops, name, scheme):
    torch.manual_seed(2)
    for tokens, inputs, inner in SHAPES:
        x, _, bias = drawn(getattr(torch, name), tokens, inputs := max(32, inputs // 32 * 32), inner)
        weight = codes(SCHEMES[scheme], 2 * inner, inputs)
        for own in (None, bias):
            want = ops.gated_activation(ops.quantized_linear(x, weight, own), Activation.SILU)
            assert torch.equal(ops.gated_linear(x, weight, own, Activation.SILU), want), (tokens, inputs, inner)


def codes(scheme, outputs, inputs):
    scales = torch.rand(outputs, inputs // (scheme.group_size or inputs)) * 0.01
    if scheme.bits == 4:
        return QuantizedWeight(scheme, torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8), scales)
    return QuantizedWeight(scheme, torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), scales)


def test_one_native_call_does_it_all(ops, monkeypatch):
    x, weight, bias = drawn(torch.bfloat16, 5, 64, 32)
    want = ReferenceOps().gated_linear(x.double(), weight.double(), bias.double(), Activation.SILU)
    for name in ("_linear_kernel", "_quantized_linear_kernel", "_gated_activation_kernel"):
        monkeypatch.setattr(ops, name, None)
    torch.testing.assert_close(ops.gated_linear(x, weight, bias, Activation.SILU).double(), want, rtol=0.03, atol=0.03)
    weight = codes(SCHEMES["w8a8"], 64, 64)
    want = ReferenceOps().gated_linear(x.float(), weight, bias.float(), Activation.SILU)
    got = ops.gated_linear(x, weight, bias, Activation.SILU)
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(("rows", "columns"), [(7, 8), (8, 9)], ids=["odd", "inner-size"])
def test_what_does_not_fit_is_refused_by_the_reference(ops, rows, columns):
    with pytest.raises((ValueError, RuntimeError)):
        ops.gated_linear(torch.randn(3, 8), torch.randn(rows, columns), None, Activation.SILU)
