"""Products of quantized factors: against float64 on the same codes, and against the product before quantization."""

import math

import pytest
import torch

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.quantization import (
    FORMATS,
    QuantizedRows,
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
    quantize_weight_blocks,
)
from zif.kernels.quantized_linear import quantized_linear, weight_only_linear
from zif.kernels.tuning import LaunchConfig, Rule, Tuning

FP8 = [dtype for dtype in FORMATS if dtype != torch.int8]
SHAPES = [(1, 1, 16), (3, 40, 513), (17, 300, 160), (65, 257, 300), (0, 64, 64)]
NMSE = {torch.int8: 5e-4, torch.float8_e4m3fn: 2e-3, torch.float8_e4m3fnuz: 2e-3, torch.float8_e5m2: 8e-3}
"""Of a normal distribution, of both factors together; e5m2 has a bit less than the others."""


def _draw(rows, columns, inner, dtype=torch.bfloat16):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner) / math.sqrt(inner)
    return x.to(dtype), weight.to(dtype), torch.randn(columns).to(dtype)


def _launcher(**tiles):
    given = {"ROWS": 16, "COLUMNS": 32, "INNER": 32, "GROUP": 1, "DIES": 1, "SPLITS": 1, "NATIVE": 1} | tiles
    names = ("int8_linear", "fp8_linear", "block_scaled_linear")
    rules = {name: [Rule((), LaunchConfig(tuple(given.items())))] for name in names}
    return InterpretedLauncher(Tuning([rules, {"merge_splits": [Rule((), LaunchConfig((("ELEMENTS", 64),)))]}]))


def _spread(scales, rows, inner):
    return scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :inner]


def _check(got, x, weight, bias=None):
    """Compare with the product of these factors, float64, up to the rounding of the result and of float32 sums."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T
    error = (got.double() - expected).abs()
    assert (error <= torch.finfo(got.dtype).eps * expected.abs() + 3e-6 * size + 1e-9).all()


def _nmse(got, expected):
    return float((got.double() - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_times_channels(stored, shape, per_channel, biased):
    x, weight, bias = _draw(*shape)
    launch, given = InterpretedLauncher(), bias if biased else None
    rows, factor = quantize_rows(launch, x, stored), quantize_weight(weight, stored, per_channel=per_channel)
    got = quantized_linear(launch, rows, factor, given, x.dtype)
    scale = factor.scales.double()[:, None] if per_channel else factor.scales.double()
    _check(got, rows.values.double() * rows.scales, factor.values.double() * scale, given)
    if shape[2] > 16 and shape[0]:
        assert _nmse(got, x.double() @ weight.double().T + (bias.double() if biased else 0)) < NMSE[stored]


@pytest.mark.parametrize("stored", FP8)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grouped", [True, False])
def test_blocks_with_scales_of_their_own(stored, shape, grouped):
    num_rows, columns, inner = shape
    x, weight, bias = _draw(*shape)
    launch = InterpretedLauncher()
    if grouped:
        padded = torch.nn.functional.pad(x, (0, -inner % 128))
        groups = quantize_rows(launch, padded, stored, group_size=128)
        rows = QuantizedRows(groups.values[:, :inner], groups.scales)
        x_scales = groups.scales.double().repeat_interleave(128, 1)[:, :inner]
    else:
        rows = quantize_rows(launch, x, stored)
        x_scales = rows.scales.double()
    blocks = quantize_weight_blocks(weight, stored)
    got = quantized_linear(launch, rows, blocks, bias, torch.float16)
    _check(got, rows.values.double() * x_scales, blocks.values.double() * _spread(blocks.scales, columns, inner), bias)
    if num_rows and inner > 16:
        assert _nmse(got, x.double() @ weight.double().T + bias.double()) < NMSE[stored]


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_only(stored, dtype, shape, per_channel):
    x, weight, bias = _draw(*shape, dtype)
    factor = quantize_weight(weight, stored, per_channel=per_channel)
    scale = factor.scales.double()[:, None] if per_channel else factor.scales.double()
    got = weight_only_linear(InterpretedLauncher(), x, factor, bias)
    assert got.dtype == dtype
    _check(got, x, factor.values.double() * scale, bias)


@pytest.mark.parametrize("stored", FP8)
def test_converted_codes_give_what_native_products_give(stored):
    x, weight, _ = _draw(33, 70, 200)
    rows, factor = quantize_rows(InterpretedLauncher(), x, stored), quantize_weight(weight, stored)
    blocks = quantize_weight_blocks(weight, stored)
    for given in (factor, blocks):
        native, converted = (
            quantized_linear(_launcher(NATIVE=native), rows, given, None, torch.float32) for native in (1, 0)
        )
        torch.testing.assert_close(native, converted, rtol=1e-6, atol=1e-6)


def test_sums_of_int8_products_are_exact():
    """More than float32 holds: 300 products of 127 * 127, and one of 1."""
    values = torch.full((2, 4000), 127, dtype=torch.int8)
    weight = values.clone()
    weight[1, 3999] = 126
    rows = QuantizedRows(values, torch.ones(2, 1))
    got = quantized_linear(_launcher(INNER=512), rows, QuantizedWeight(weight, torch.ones(2)), None, torch.float32)
    assert got[0, 0] - got[0, 1] in (124.0, 128.0), "float32 rounds once, at the end, to multiples of 4"


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tiles", [{"SPLITS": 3}, {"SPLITS": 8}, {"GROUP": 2, "DIES": 4}])
def test_splits_and_orders(stored, tiles):
    x, weight, bias = _draw(33, 70, 200)
    rows, factor = quantize_rows(InterpretedLauncher(), x, stored), quantize_weight(weight, stored)
    expected = quantized_linear(_launcher(), rows, factor, bias, torch.float32)
    got = quantized_linear(_launcher(**tiles), rows, factor, bias, torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", FORMATS)
def test_a_nan_stays_in_its_row(stored):
    x, weight, bias = _draw(20, 30, 64)
    launch, factor = InterpretedLauncher(), quantize_weight(weight, stored)
    clean = quantized_linear(launch, quantize_rows(launch, x, stored), factor, bias, x.dtype)
    x[3, 5], x[7] = math.nan, 0
    dirty = quantized_linear(launch, quantize_rows(launch, x, stored), factor, bias, x.dtype)
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(dirty[others], clean[others])
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[7], bias)


def test_rows_may_be_strided():
    x, weight, bias = _draw(6, 20, 128)
    launch, factor = InterpretedLauncher(), quantize_weight(weight[:, 64:], torch.int8)
    rows = quantize_rows(launch, x, torch.int8)
    cut = QuantizedRows(rows.values[:, 64:], rows.scales)
    dense = QuantizedRows(cut.values.contiguous(), rows.scales)
    got = quantized_linear(launch, cut, factor, bias, x.dtype)
    assert torch.equal(got, quantized_linear(launch, dense, factor, bias, x.dtype))
    wide = QuantizedWeight(quantize_weight(weight, torch.int8).values[:, 64:], factor.scales)
    dense_weight = QuantizedWeight(wide.values.contiguous(), factor.scales)
    got = weight_only_linear(launch, x[:, 64:], wide, bias)
    assert torch.equal(got, weight_only_linear(launch, x[:, 64:].contiguous(), dense_weight, bias))


def test_arguments_that_do_not_fit_are_refused():
    x, weight, bias = _draw(4, 8, 256)
    launch = InterpretedLauncher()
    rows, factor = quantize_rows(launch, x, torch.float8_e5m2), quantize_weight(weight, torch.float8_e5m2)
    blocks, other = quantize_weight_blocks(weight, torch.float8_e5m2), quantize_weight(weight, torch.int8)

    def refused(message, x, weight, bias=bias):
        with pytest.raises(ValueError, match=message):
            quantized_linear(launch, x, weight, bias, torch.bfloat16)

    refused("one dtype", rows, other)
    refused("inner sizes", QuantizedRows(rows.values[:, 1:], rows.scales), factor)
    refused("bias", rows, factor, bias[1:])
    refused("scales of the weight", rows, QuantizedWeight(factor.values, factor.scales[1:]))
    refused("scales of x", QuantizedRows(rows.values, rows.scales[1:]), factor)
    refused("scales of blocks", rows, QuantizedWeight(blocks.values, blocks.scales[:, 1:]))
    refused("scales of x", QuantizedRows(rows.values, rows.scales.repeat(1, 3)), blocks)
    with pytest.raises(ValueError, match="float64"):
        weight_only_linear(launch, x.double(), factor, None)
    with pytest.raises(ValueError, match="must be one of"):
        weight_only_linear(launch, x, QuantizedWeight(weight, factor.scales), None)
