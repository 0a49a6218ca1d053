"""Numbers in 8 and 4 bits: activations quantized row by row on the device, weights in plain torch when they are loaded.

Eight-bit floats are encoded and decoded with integer operations, so that every part gives the same bits, also one
whose compiler has no such type: e4m3fn and e5m2 (Micikevicius et al., 2022), and e4m3fnuz, whose exponent is offset by
one more and whose negative zero is its only NaN.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher

FORMATS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
}
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0, torch.float8_e5m2: 57344.0}
"""The largest number of each dtype. That of int8 is the largest whose negative exists too."""
SMALLEST_SCALE = 2.0**-126
"""A row of zeros has a scale too: a quotient by the smallest normal number is finite."""
BLOCK = 128
"""Rows and columns of a block of a weight, and columns of a group of x, that have a scale of their own."""


@triton.jit
def encode_fp8(value, FORMAT: tl.constexpr) -> tl.tensor:
    """Round float32, at most the format's largest number, to the nearest code, ties to even. Returns int32."""
    MANTISSA: tl.constexpr = 2 if FORMAT == "e5m2" else 3
    BIAS: tl.constexpr = 15 if FORMAT == "e5m2" else (8 if FORMAT == "e4m3fnuz" else 7)
    SMALLEST: tl.constexpr = 2.0 ** (1 - BIAS)
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    dropped: tl.constexpr = 23 - MANTISSA
    half = (1 << (dropped - 1)) - 1 + ((magnitude >> dropped) & 1)
    normal = ((magnitude + half) >> dropped) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number all steps are equal: those of a float32 this much larger.
    shift: tl.constexpr = 24 - BIAS - MANTISSA
    raised = tl.abs(value) + 2.0**shift
    subnormal = raised.to(tl.int32, bitcast=True) - ((127 + shift) << 23)
    code = tl.where(tl.abs(value) < SMALLEST, subnormal, normal)
    signed = code | ((bits >> 24) & 0x80)
    if FORMAT == "e4m3fnuz":
        signed = tl.where(code == 0, 0, signed)
    return tl.where(value == value, signed, 0x80 if FORMAT == "e4m3fnuz" else 0x7F)


@triton.jit
def decode_fp8(code, FORMAT: tl.constexpr) -> tl.tensor:
    """Return the float32 of unsigned 8-bit codes, exactly."""
    if FORMAT == "e5m2":
        # The upper half of a float16.
        value = (code.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        BIAS: tl.constexpr = 8 if FORMAT == "e4m3fnuz" else 7
        wide = code.to(tl.int32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
        missing = wide == 0x80 if FORMAT == "e4m3fnuz" else (wide & 0x7F) == 0x7F
        value = tl.where(missing, float("nan"), value)
    return value


@triton.jit
def _quantize_rows(
    x, values, scales, num_rows, groups, x_stride, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, SMALLEST: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows)[:, None] & (place < columns)
    start = (row // groups * x_stride + row % groups * columns)[:, None]
    wide = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(wide), axis=1)
    # A maximum may pass over a NaN. As the scale it reaches the whole row of the product, whatever its code is.
    missing = tl.max((wide != wide).to(tl.int32), axis=1) > 0
    scale = tl.where(missing, float("nan"), tl.maximum(tl.div_rn(largest, LIMIT), SMALLEST))
    scaled = tl.div_rn(wide, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
    scaled = tl.where(scaled > LIMIT, LIMIT, tl.where(scaled < -LIMIT, -LIMIT, scaled))
    if FORMAT == "int8":
        # Adding 1.5 * 2^23 leaves no bits below one: the sum is rounded to the nearest even integer.
        rounded = (scaled + 12582912.0) - 12582912.0
        code = tl.where(rounded == rounded, rounded, 0.0).to(tl.int8)
    else:
        code = encode_fp8(scaled, FORMAT).to(tl.uint8)
    tl.store(values + row[:, None] * columns + place, code, mask=inside)
    tl.store(scales + row, scale, mask=row < num_rows)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations. values: [T, I], int8 or fp8. scales: [T, 1] or, of groups, [T, I / 128], float32.

    Each value times its scale is what was quantized.
    """

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight. values: [O, I], int8 or fp8. scales, float32: [O], or [1] for all, or [O / 128, I / 128] of blocks."""

    values: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight in groups along its rows. packed: [O, I / 2], uint8. scales: [O, I / group_size], any float dtype.

    zeros: [O, I / group_size], uint8, from 0 to 15, or None where 8 stands for zero. A value is (code - zero) * scale.
    In a group of g codes, byte j holds code j in its lower and code j + g / 2 in its upper half, so that what one load
    gives stays in order.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, [O, I], rounded to `dtype` once."""
        columns, num_groups = self.scales.shape
        pairs = self.packed.view(columns, num_groups, self.group_size // 2)
        codes = torch.cat((pairs & 15, pairs >> 4), dim=-1).float()
        zeros = torch.full_like(self.scales, 8) if self.zeros is None else self.zeros
        return ((codes - zeros.float()[..., None]) * self.scales.float()[..., None]).flatten(1).to(dtype)


def quantize_rows(
    launch: Launcher, x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> QuantizedRows:
    """Quantize each row of x [T, I], or each group of `group_size` in it, by its own largest magnitude.

    Values are rounded to the nearest, ties to even. A row of zeros stays zeros; a NaN makes the scale of its row (its
    group) NaN. Raises `ValueError` on another dtype than int8 or fp8, or groups that do not divide the row.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype {dtype} must be one of {[str(known) for known in FORMATS]}")
    num_tokens, inner = x.shape
    columns = group_size or inner
    if inner % max(columns, 1):
        raise ValueError(f"rows of {inner} cannot be divided into groups of {columns}; pad them or change group_size")
    groups = inner // columns if columns else 1
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(num_tokens, groups, dtype=torch.float32, device=x.device)
    codes = values if dtype == torch.int8 else values.view(torch.uint8)
    config = launch.tuning.config("quantize_rows", columns=columns)
    num_rows = num_tokens * groups
    constants = {"COLUMNS": triton.next_power_of_2(columns), "LIMIT": LIMITS[dtype], "SMALLEST": SMALLEST_SCALE}
    arguments = (x, codes, scales, num_rows, groups, x.stride(0), columns)
    grid = (triton.cdiv(num_rows, config["ROWS"]),)
    launch(_quantize_rows, grid, arguments, config, FORMAT=FORMATS[dtype], **constants)
    return QuantizedRows(values, scales)


def quantize_weight(weight: torch.Tensor, dtype: torch.dtype, *, per_channel: bool = True) -> QuantizedWeight:
    """Quantize a weight [O, I] by the largest magnitude of each row, or of all. Runs where the weight is."""
    wide = weight.float()
    largest = wide.abs().amax(-1) if per_channel else wide.abs().amax()[None]
    scales = (largest / LIMITS[dtype]).clamp(min=SMALLEST_SCALE)
    return QuantizedWeight(_rounded(wide / scales[:, None], dtype), scales)


def quantize_weight_blocks(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedWeight:
    """Quantize a weight [O, I] by the largest magnitude of each block of 128 x 128. Runs where the weight is."""
    columns, inner = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -inner % BLOCK, 0, -columns % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / LIMITS[dtype]).clamp(min=SMALLEST_SCALE)
    values = _rounded(blocks / scales[:, None, :, None], dtype).view(padded.shape)[:columns, :inner]
    return QuantizedWeight(values.contiguous(), scales)


def quantize_weight_int4(weight: torch.Tensor, group_size: int, *, symmetric: bool = True) -> Int4Weight:
    """Quantize a weight [O, I] in groups of 32, 64 or 128 along its rows. Scales have the weight's dtype.

    Symmetric codes stand for -7 to 7 times the scale; others have a zero point, so that a group uses all 16 codes.
    Runs where the weight is. Raises `ValueError` where groups do not divide the rows.
    """
    columns, inner = weight.shape
    if group_size not in (32, 64, 128) or inner % group_size:
        raise ValueError(f"group_size {group_size} must be 32, 64 or 128 and divide the rows of {inner}")
    groups = weight.float().view(columns, inner // group_size, group_size)
    if symmetric:
        scales = (groups.abs().amax(-1) / 7).clamp(min=SMALLEST_SCALE).to(weight.dtype)
        codes = (groups / scales.float()[..., None]).round().clamp(-7, 7) + 8
        return Int4Weight(pack_int4(codes.to(torch.uint8), group_size), scales, None, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=SMALLEST_SCALE).to(weight.dtype)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return Int4Weight(pack_int4(codes.to(torch.uint8), group_size), scales, zeros.to(torch.uint8), group_size)


def pack_int4(codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Pack codes from 0 to 15, uint8, [O, I / group_size, group_size] or [O, I], as `Int4Weight` holds them."""
    grouped = codes.reshape(codes.shape[0], -1, group_size)
    low, high = grouped.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def _rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = wide.clamp(-LIMITS[dtype], LIMITS[dtype])
    return wide.round().to(dtype) if dtype == torch.int8 else wide.to(dtype)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for columns in (2880, 4096, 14336):
        for dtype in FORMATS:
            x = torch.empty(64, columns, dtype=torch.bfloat16, device="meta")
            quantize_rows(launch, x, dtype)
    for inner in (torch.bfloat16, torch.float16):
        x = torch.empty(64, 7168, dtype=inner, device="meta")
        quantize_rows(launch, x, torch.float8_e4m3fn, group_size=BLOCK)
        quantize_rows(launch, x, torch.int8)
