"""Products with 4-bit weights, against float64 on the dequantized weight."""

import math

import pytest
import torch

from zif.kernels.int4_linear import int4_linear
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.quantization import Int4Weight, quantize_weight_int4
from zif.kernels.tuning import LaunchConfig, Rule, Tuning

SHAPES = [(1, 1, 128), (3, 40, 640), (17, 300, 384), (65, 257, 128), (0, 64, 128)]


def _draw(rows, columns, inner, dtype=torch.bfloat16):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner) / math.sqrt(inner)
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


def _launcher(**tiles):
    given = {"ROWS": 16, "COLUMNS": 32, "INNER": 32, "GROUP": 1, "DIES": 1, "SPLITS": 1} | tiles
    rules = {"int4_linear": [Rule((), LaunchConfig(tuple(given.items())))]}
    return InterpretedLauncher(Tuning([rules, {"merge_splits": [Rule((), LaunchConfig((("ELEMENTS", 64),)))]}]))


def _check(got, x, weight, bias):
    wide = weight.dequantized(x.dtype).double()
    expected = x.double() @ wide.T + bias.double()
    size = x.double().abs() @ wide.abs().T
    error = (got.double() - expected).abs()
    assert got.dtype == x.dtype
    assert (error <= torch.finfo(got.dtype).eps * expected.abs() + 3e-6 * size + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_product_with_the_dequantized_weight(dtype, shape, group_size, symmetric):
    x, weight, bias = _draw(*shape, dtype)
    packed = quantize_weight_int4(weight, group_size, symmetric=symmetric)
    _check(int4_linear(InterpretedLauncher(), x, packed, bias), x, packed, bias)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("inner", [16, 32, 64, 128])
@pytest.mark.parametrize("splits", [1, 3])
def test_tiles_smaller_and_larger_than_a_group(group_size, inner, splits):
    x, weight, bias = _draw(5, 40, 384)
    packed = quantize_weight_int4(weight, group_size, symmetric=False)
    _check(int4_linear(_launcher(INNER=inner, SPLITS=splits), x, packed, bias), x, packed, bias)


def test_every_code_has_its_place():
    """One column of x at a time: its code, its group's scale and its zero point show exactly."""
    packed = quantize_weight_int4(torch.randn(24, 128), 32, symmetric=False)
    got = int4_linear(_launcher(), torch.eye(128), packed, None)
    assert torch.equal(got, packed.dequantized(torch.float32).T)


def test_a_nan_stays_in_its_row_and_rows_may_be_strided():
    x, weight, bias = _draw(6, 40, 256, torch.float16)
    packed = quantize_weight_int4(weight[:, 128:], 64)
    clean = int4_linear(InterpretedLauncher(), x[:, 128:].contiguous(), packed, bias)
    x[2, 130] = math.nan
    dirty = int4_linear(InterpretedLauncher(), x[:, 128:], packed, bias)
    assert torch.equal(dirty[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    assert dirty[2].isnan().all()


def test_arguments_that_do_not_fit_are_refused():
    x, weight, bias = _draw(4, 8, 256)
    packed = quantize_weight_int4(weight, 64, symmetric=False)
    launch = InterpretedLauncher()

    def spoilt(**changes):
        fields = {"packed": packed.packed, "scales": packed.scales, "zeros": packed.zeros, "group_size": 64}
        return Int4Weight(**(fields | changes))

    for message, arguments in [
        ("inner sizes", (x[:, 64:], packed, bias)),
        ("bias", (x, packed, bias[1:])),
        ("group_size 16", (x, spoilt(group_size=16), bias)),
        ("scales of shape", (x, spoilt(scales=packed.scales[:, 1:]), bias)),
        ("zeros of shape", (x, spoilt(zeros=packed.zeros[1:]), bias)),
        ("float64", (x.double(), packed, bias)),
    ]:
        with pytest.raises(ValueError, match=message):
            int4_linear(launch, *arguments)
