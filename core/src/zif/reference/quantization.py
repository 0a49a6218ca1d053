"""Executable semantics of weights held as integers, in plain torch. Used by `zif.reference.ops` and by the loader."""

import torch
from torch.nn import functional

from zif.contract import QuantizedWeight, WeightScheme

CODE_LIMIT = 127
"""The largest code of 8 bits whose negative is one too; symmetric codes stay within."""

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


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements, (code - zero) * scale, [..., O, I], rounded to `dtype` once."""
    codes = unpack(weight)
    num_groups = weight.scales.shape[-1]
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

    Symmetric codes go from -127 to 127, or stand for -7 to 7; with zero points a group uses all of its codes and zero
    stays exactly zero. Raises `ValueError` where groups do not divide the inputs.
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
    else:
        limit = CODE_LIMIT if scheme.bits == 8 else 7
        scales = _positive(groups.abs().amax(-1) / limit)
        codes = (groups / scales[..., None]).round().clamp(-limit, limit) + _ZERO[scheme.bits]
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
