"""Products of weights held as integers against sums of integers and of float64, for every instruction set."""

import math

import numpy as np
import pytest
import torch

from support.quantized_weights import weight_of
from zif.contract import QuantizedWeight, WeightScheme
from zif.reference.ops import ReferenceOps
from zif_cpu.library import DTYPE_CODES
from zif_cpu.operators import NativeOps

DTYPES = [getattr(torch, name) for name in DTYPE_CODES]
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
INTEGERS = WeightScheme(8, dynamic_activations=True)

# Tokens, inputs, outputs: one of everything, borders of vectors and tiles, none of their multiples.
SHAPES = (
    *((1, 1, 1), (1, 64, 16), (1, 1000, 7), (2, 31, 32), (3, 7, 5), (4, 96, 33), (5, 33, 17), (8, 80, 64)),
    *((15, 128, 31), (16, 32, 16), (17, 96, 100), (33, 260, 48), (70, 192, 65), (130, 64, 130)),
)
# Group (None: one), inputs, outputs.
GROUPS = ((None, 64, 33), (None, 80, 17), (None, 1088, 40), (32, 96, 5), (128, 256, 65), (64, 192, 16), (512, 1024, 3))
ODD_GROUPS = ((2, 6, 5), (8, 40, 17), (24, 96, 33), (16, 80, 16))


class Refused(ReferenceOps):
    def quantized_linear(self, *_):
        raise AssertionError("the library does not serve this")


class Served(NativeOps, Refused):
    """The native operators, for arguments that they serve."""


@pytest.fixture
def ops(library, request):
    torch.manual_seed(1)
    return Served(library, request.node.callspec.params["library"])


def rounded(x):
    """Round rows of x, [T, I], to 8 bits as the contract says. Returns codes, int64, and scales, float64."""
    wide = x.float().numpy()
    scales = np.abs(wide).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(wide / np.where(scales > 0, scales, np.float32(1))).clip(-127, 127)
    return codes.astype(np.int64), scales.astype(np.float64)


def strided(tokens, inputs, dtype, seed=0):
    return torch.randn(tokens, inputs + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :inputs]


def assert_near(actual, exact, allowed):
    """Compare with half a unit of the result and `allowed` more."""
    error = np.abs(actual.double().numpy() - exact)
    smallest = 2.0**-25 if actual.dtype is torch.float16 else 1e-30
    bound = 1.01 * HALF_UNIT[actual.dtype] * np.abs(exact) + allowed + smallest
    assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rounded_activations_are_exact_but_for_their_scales(ops, dtype):
    for tokens, inputs, outputs in SHAPES:
        weight, _ = weight_of(INTEGERS, outputs, inputs)
        x, bias = strided(tokens, inputs, dtype), torch.randn(outputs).to(dtype)
        codes, scales = rounded(x)
        sums = codes @ weight.codes.numpy().astype(np.int64).T
        exact = sums * scales * weight.scales.double().numpy()[:, 0]
        for given in (None, bias):
            want = exact if given is None else exact + given.double().numpy()
            # Three roundings to float32: of the sum, which may be zero but for the bias, and of two scales.
            assert_near(ops.quantized_linear(x, weight, given), want, 2.0**-22 * (np.abs(exact) + np.abs(want)))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_decoded_weights_are_those_of_float64(ops, dtype, bits, zero_points):
    for group, inputs, outputs in (*GROUPS, *ODD_GROUPS):
        weight, elements = weight_of(WeightScheme(bits, group, zero_points), outputs, inputs)
        for tokens in (1, 2, 3, 5, 16, 33, 70):
            x, bias = strided(tokens, inputs, dtype, tokens), torch.randn(outputs).to(dtype)
            wide = x.double().numpy()
            scale = np.abs(wide) @ np.abs(elements).T
            for given in (None, bias):
                want = wide @ elements.T + (0 if given is None else given.double().numpy())
                assert_near(ops.quantized_linear(x, weight, given), want, 2.0**-23 * math.sqrt(inputs + 8) * scale)


@pytest.mark.parametrize("scheme", [INTEGERS, WeightScheme(8), WeightScheme(8, 32, True), WeightScheme(4, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_alone_and_among_others(ops, library, dtype, scheme):
    weight, _ = weight_of(scheme, 300, 128)
    x, bias = strided(140, 128, dtype), torch.randn(300).to(dtype)
    together = ops.quantized_linear(x, weight, bias)
    for first, count in ((0, 1), (1, 2), (3, 3), (6, 4), (10, 5), (15, 17), (32, 33), (65, 75)):
        some = ops.quantized_linear(x[first : first + count], weight, bias)
        assert torch.equal(some, together[first : first + count]), (first, count)
    library.raw.zif_cpu_use_threads(1)
    assert torch.equal(ops.quantized_linear(x, weight, bias), together)


@pytest.mark.parametrize("scheme", [INTEGERS, WeightScheme(8), WeightScheme(4, 32, True)], ids=str)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_with_its_token(ops, dtype, wrong, scheme):
    weight, _ = weight_of(scheme, 33, 96)
    for tokens, place in ((1, 0), (3, 1), (40, 17)):
        x = strided(tokens, 96, dtype)
        right = ops.quantized_linear(x, weight, None)
        x = x.clone()
        x[place, 40] = wrong
        y = ops.quantized_linear(x, weight, None)
        others = torch.arange(tokens) != place
        assert torch.equal(y[others], right[others])
        if scheme.dynamic_activations or math.isnan(wrong):
            assert bool(y[place].isnan().all())
        else:
            assert not bool(y[place].isfinite().any())


@pytest.mark.parametrize("scheme", [INTEGERS, WeightScheme(8, None, True), WeightScheme(4, 32)], ids=str)
def test_rows_of_zeros_give_the_bias(ops, scheme):
    weight, _ = weight_of(scheme, 40, 64)
    bias = torch.randn(40).bfloat16()
    for tokens in (1, 6):
        y = ops.quantized_linear(torch.zeros(tokens, 64).bfloat16(), weight, bias)
        assert torch.equal(y, bias.expand(tokens, 40))
        assert not bool(ops.quantized_linear(torch.zeros(tokens, 64), weight, None).any())


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_of_integers_do_not_wrap(ops, code):
    inputs = 16384
    codes = torch.full((35, inputs), code, dtype=torch.int8)
    weight = QuantizedWeight(INTEGERS, codes, torch.ones(35, 1))
    for tokens in (1, 6):
        for sign in (-1, 1):
            y = ops.quantized_linear(torch.full((tokens, inputs), 127.0 * sign), weight, None)
            assert bool((y == float(127 * sign * code * inputs)).all())


def test_sums_of_negative_zero_are_the_same_for_any_number_of_tokens(ops):
    weight = QuantizedWeight(WeightScheme(8, 32), torch.ones(32, 64, dtype=torch.int8), torch.full((32, 2), 1e-30))
    x = torch.full((17, 64), -1e-30)
    want = ops.quantized_linear(x, weight, None)
    for tokens in (1, 5):
        got = ops.quantized_linear(x[:tokens], weight, None)
        assert torch.equal(got.view(torch.int32), want[:tokens].view(torch.int32))


def test_ties_go_to_the_even_code(ops):
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    weight = QuantizedWeight(INTEGERS, torch.eye(8).to(torch.int8), torch.ones(8, 1))
    for tokens in (1, 7):
        y = ops.quantized_linear(row.expand(tokens, 8).contiguous(), weight, None)
        assert y[-1].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_numbers_are_rounded_as_the_reference_does(ops, dtype):
    x = torch.tensor([[3e-41, -1e-41, 0.0, 2e-41]]).to(dtype)
    codes, scales = rounded(x)
    weight = QuantizedWeight(INTEGERS, torch.eye(4).to(torch.int8), torch.full((4, 1), 2.0**100))
    assert_near(ops.quantized_linear(x, weight, None), codes * scales * 2.0**100, 1e-6 * scales * 2.0**100)


@pytest.mark.parametrize("scheme", [INTEGERS, WeightScheme(8, 32), WeightScheme(4, 32)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_nothing_is_written_outside_of_the_result(ops, monkeypatch, tokens, scheme):
    weight, _ = weight_of(scheme, 37, 96)
    guarded = torch.full((tokens * 37 + 64,), 7.0).bfloat16()
    x = strided(tokens, 96, torch.bfloat16)
    right = ops.quantized_linear(x, weight, None)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: guarded[32:-32].view(tokens, 37))
    assert torch.equal(ops.quantized_linear(x, weight, None), right)
    assert bool((torch.cat((guarded[:32], guarded[-32:])) == 7).all())
