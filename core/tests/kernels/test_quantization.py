"""Quantization against torch's own conversions, bit by bit, and the errors that a step size allows."""

import math

import pytest
import torch
import triton
import triton.language as tl

from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.quantization import (
    FORMATS,
    LIMITS,
    SMALLEST_SCALE,
    decode_fp8,
    encode_fp8,
    quantize_rows,
    quantize_weight,
    quantize_weight_blocks,
    quantize_weight_int4,
)
from zif.kernels.tuning import LaunchConfig

FP8 = [dtype for dtype in FORMATS if dtype != torch.int8]


@triton.jit
def _encode(values, codes, count, FORMAT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < count
    code = encode_fp8(tl.load(values + place, mask=inside, other=0.0), FORMAT)
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def _decode(codes, values, FORMAT: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(values + place, decode_fp8(tl.load(codes + place), FORMAT))


@pytest.mark.parametrize("dtype", FP8)
def test_all_codes_are_decoded_exactly(dtype):
    codes, values = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    InterpretedLauncher()(_decode, (1,), (codes, values), LaunchConfig(), FORMAT=FORMATS[dtype])
    expected = codes.view(dtype).float()
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit() | values.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("dtype", FP8)
def test_numbers_between_codes_are_rounded_as_torch_rounds_them(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].unique()
    halves = (codes[1:] + codes[:-1]) / 2
    values = torch.cat((codes, halves, halves.nextafter(codes[1:]), halves.nextafter(codes[:-1])))
    values = torch.cat((values, torch.tensor([math.nan, -0.0, 1e-30, -1e-30, 1e-45]), torch.randn(1000)))
    got = torch.empty(len(values), dtype=torch.uint8)
    arguments = (values, got, len(values))
    InterpretedLauncher()(_encode, (1,), arguments, LaunchConfig(), FORMAT=FORMATS[dtype], SIZE=4096)
    expected = values.to(dtype)
    number = ~values.isnan()
    assert torch.equal(got[number], expected[number].view(torch.uint8))
    assert got.view(dtype).float()[~number].isnan().all()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 96), (70, 33), (2, 4100), (0, 64)])
def test_rows_have_the_scale_of_their_largest_value(source, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(source)
    got = quantize_rows(InterpretedLauncher(), x, dtype)
    scales = x.float().abs().amax(-1, keepdim=True) / LIMITS[dtype]
    assert got.scales.dtype == torch.float32
    assert torch.equal(got.scales, scales)
    scaled = (x.float() / scales).clamp(-LIMITS[dtype], LIMITS[dtype])
    expected = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    assert torch.equal(got.values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", FORMATS)
def test_groups_have_scales_of_their_own_in_strided_rows(dtype):
    fused = torch.randn(3, 1000, dtype=torch.bfloat16)
    x = fused[:, 100:612]
    got = quantize_rows(InterpretedLauncher(), x, dtype, group_size=128)
    alone = quantize_rows(InterpretedLauncher(), x.reshape(12, 128), dtype)
    assert torch.equal(got.scales, alone.scales.view(3, 4))
    assert torch.equal(got.values.view(torch.uint8), alone.values.view(torch.uint8).view(3, 512))


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_nan_infinity_and_tiny_rows(dtype):
    x = torch.randn(5, 40)
    clean = quantize_rows(InterpretedLauncher(), x, dtype)
    x[0], x[1, 3], x[2] = 0, math.nan, 1e-42
    x[3, 7] = math.inf
    got = quantize_rows(InterpretedLauncher(), x, dtype)
    assert got.scales[0] == SMALLEST_SCALE
    assert (got.values[0].float() == 0).all()
    assert got.scales[1].isnan()
    assert (got.values[2].float() * got.scales[2]).sub(1e-42).abs().max() <= SMALLEST_SCALE
    assert got.scales[3].isinf()
    assert torch.equal(got.values[4].view(torch.uint8), clean.values[4].view(torch.uint8))


def test_dtypes_and_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"torch.int16"):
        quantize_rows(InterpretedLauncher(), torch.randn(2, 8), torch.int16)
    with pytest.raises(ValueError, match="groups of 128"):
        quantize_rows(InterpretedLauncher(), torch.randn(2, 200), torch.int8, group_size=128)
    with pytest.raises(ValueError, match="group_size 32"):
        quantize_weight_int4(torch.randn(2, 48), 32)
    with pytest.raises(ValueError, match="group_size 48"):
        quantize_weight_int4(torch.randn(2, 48), 48)


def _relative_error(got, weight):
    return float((got.double() - weight.double()).square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("dtype", FORMATS)
def test_weights_come_back(dtype):
    weight = torch.randn(300, 200) * torch.logspace(-3, 3, 300)[:, None]
    weight[5] = 0
    limit = 1e-3 if dtype == torch.int8 else 5e-3
    channels, whole = quantize_weight(weight, dtype), quantize_weight(weight, dtype, per_channel=False)
    blocks = quantize_weight_blocks(weight, dtype)
    assert _relative_error(channels.values.float() * channels.scales[:, None], weight) < limit
    assert _relative_error(whole.values.float() * whole.scales, weight) < limit
    assert blocks.scales.shape == (3, 2)
    spread = blocks.scales.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert _relative_error(blocks.values.float() * spread, weight) < limit
    assert (channels.values[5].float() == 0).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_weights_are_off_by_half_a_step_at_most(group_size, symmetric):
    weight = torch.randn(10, 256)
    weight[3] = 0
    weight[4] = weight[4].abs()
    got = quantize_weight_int4(weight, group_size, symmetric=symmetric)
    assert got.packed.shape == (10, 128)
    error = (got.dequantized(torch.float32) - weight).view(10, -1, group_size).abs().amax(-1)
    # A zero point is rounded too: the ends of its range may be off by another half step.
    assert (error <= got.scales * (0.5001 if symmetric else 1.0001)).all()
