"""Executable semantics of weights, keys and values held as integers, in plain torch.

Used by the other modules of `zif.reference`, by the loader and by attention in host memory.
"""

import torch
from torch.nn import functional

from zif.contract import QuantizedWeight, WeightScheme

CODE_LIMIT = 127
"""The largest code of 8 bits whose negative is one too; symmetric codes stay within."""

SCALE_BYTES = 4
"""Bytes of the float32 scale that ends a row of codes."""

_ZERO = {8: 0, 4: 8}
"""What zero is in a scheme without zero points, by its bits."""


def multiply(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias as `OpTable.quantized_linear` says. x: [T, I]. Returns [T, O]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if weight.scheme.dynamic_activations:
        codes, scales = quantize_rows(x)
        product = functional.linear(codes.double(), dequantize(weight, torch.float64)) * scales.double()
    else:
        product = functional.linear(x.to(wide), dequantize(weight, wide))
    return (product if bias is None else product + bias).to(wide).to(x.dtype)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, [T, I], int8 and scales, [T, 1], float32, of the rows of x. The scale of a row is NaN where
    an element is not finite."""
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True) / CODE_LIMIT
    scales = torch.where(scales.isinf(), torch.nan, scales)
    codes = (wide / torch.where(scales > 0, scales, 1.0)).round().nan_to_num(0.0)
    return codes.clamp(-CODE_LIMIT, CODE_LIMIT).to(torch.int8), scales


def row_bytes(head_dim: int) -> int:
    """Return the bytes of a vector held as codes: one each, zeros up to a multiple of 4, and the scale."""
    return -(-head_dim // SCALE_BYTES) * SCALE_BYTES + SCALE_BYTES


def encode_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Return vectors, [..., D], as rows of codes and scales, [..., `row_bytes(D)`], int8."""
    codes, scales = quantize_rows(vectors)
    head_dim = codes.shape[-1]
    rows = codes.new_zeros(*codes.shape[:-1], row_bytes(head_dim))
    rows[..., :head_dim] = codes
    rows[..., -SCALE_BYTES:] = scales.view(torch.int8)
    return rows


def decode_vectors(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the vectors, [..., D], float32, of rows of codes and scales, whose last axis is dense."""
    return rows[..., :head_dim] * row_scales(rows)


def row_scales(rows: torch.Tensor) -> torch.Tensor:
    """Return the scales, [..., 1], float32, of rows of codes and scales, whose last axis is dense."""
    return rows.view(torch.float32)[..., -1:]


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements, (code - zero) * scale, [..., O, I], rounded to `dtype` once.

    Raises `ValueError` where scales are not those of the scheme's groups.
    """
    codes = unpack(weight)
    num_groups = weight.scales.shape[-1]
    if num_groups * (weight.scheme.group_size or codes.shape[-1]) != codes.shape[-1]:
        raise ValueError(
            f"scales of {num_groups} groups do not fit {codes.shape[-1]} inputs of {weight.scheme.name}; "
            "give one scale for each group of an output"
        )
    grouped = _in_groups(codes, num_groups).double()
    zeros = torch.full_like(weight.scales, _ZERO[weight.scheme.bits]) if weight.zeros is None else weight.zeros
    elements = (grouped - zeros.double()[..., None]) * weight.scales.double()[..., None]
    return elements.flatten(-2).to(dtype)


def unpack(weight: QuantizedWeight) -> torch.Tensor:
    """Return the codes one by one, [..., O, I], in the dtype that they have."""
    codes: torch.Tensor = weight.codes
    if weight.scheme.bits == 8:
        return codes
    num_groups = weight.scales.shape[-1]
    pairs = _in_groups(codes, num_groups)
    return torch.cat((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def pack(codes: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Return codes, [..., O, I], as a `QuantizedWeight` of the scheme holds them. Of 4 bits they are from 0 to 15."""
    if scheme.bits == 8:
        return codes.to(torch.int8)
    group_size = scheme.group_size or codes.shape[-1]
    low, high = _in_groups(codes.to(torch.uint8), codes.shape[-1] // group_size).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(-2)


def quantize(weight: torch.Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize a weight, [..., O, I], by the extremes of each group, to the nearest code.

    Symmetric codes of 8 bits go from -127 to 127. Of 4 bits there are too few to leave one out: what is largest in a
    group becomes the lowest code, which stands for -8, so its scale has the other sign. With zero points a group uses
    all of its codes and zero stays exactly zero. Raises `ValueError` where groups do not divide the inputs.
    """
    inputs = weight.shape[-1]
    group_size = scheme.group_size or inputs
    if inputs % group_size or (scheme.bits == 4 and group_size % 2):
        raise ValueError(f"groups of {group_size} do not divide {inputs} inputs of {scheme.name}")
    groups = _in_groups(weight.float(), inputs // group_size)
    zeros = None
    if scheme.zero_points:
        lowest, highest = (-128, 127) if scheme.bits == 8 else (0, 15)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = _positive((high - low) / (highest - lowest))
        zeros = (lowest - (low / scales).round()).clamp(lowest, highest)
        codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(lowest, highest)
        zeros = zeros.to(torch.int16)
    elif scheme.bits == 8:
        scales = _positive(groups.abs().amax(-1) / CODE_LIMIT)
        codes = (groups / scales[..., None]).round().clamp(-CODE_LIMIT, CODE_LIMIT)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scales = torch.where(high > -low, high, low) / -8
        scales = torch.where(scales == 0, 1.0, scales)
        codes = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    return QuantizedWeight(scheme, pack(codes.flatten(-2), scheme), scales, zeros)


def part_of(weight: QuantizedWeight, index: int) -> QuantizedWeight:
    """Return one weight of a stack."""
    zeros = None if weight.zeros is None else weight.zeros[index]
    return QuantizedWeight(weight.scheme, weight.codes[index], weight.scales[index], zeros)


def _in_groups(rows: torch.Tensor, num_groups: int) -> torch.Tensor:
    return rows.reshape(*rows.shape[:-1], num_groups, rows.shape[-1] // num_groups)


def _positive(scales: torch.Tensor) -> torch.Tensor:
    """Give a group of zeros a scale that can be divided by."""
    return torch.where(scales > 0, scales, 1.0)
