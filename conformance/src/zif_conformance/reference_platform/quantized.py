"""Products with weights held as integers, in plain torch: codes by codes, a group at a time, scaled afterwards.

Sums of codes are taken in float64, where they are exact. A vendor's kernels multiply integers, or widen codes on the
way.
"""

import torch

from zif.contract import QuantizedExperts, QuantizedWeight

_LARGEST_CODE = 127
_MIDDLE = 8
"""What zero is among codes of 4 bits that have no zero points."""


def quantized_product(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias. x: [N, I], float32. Returns [N, O], float32. Raises `ValueError` on a shape."""
    rows, row_scales = (x, x.new_ones(len(x), 1)) if not weight.scheme.dynamic_activations else _rounded(x)
    size = weight.scheme.group_size or x.shape[-1]
    codes = _codes(weight, size)
    num_groups = codes.shape[-1] // size
    if codes.shape[-1] != x.shape[-1] or weight.scales.shape != (len(codes), num_groups):
        shapes = [tuple(array.shape) for array in (x, weight.codes, weight.scales)]
        raise ValueError(f"rows, codes and scales of shapes {shapes} do not fit {weight.scheme.name}")
    total = x.new_zeros(len(x), len(codes), dtype=torch.float64)
    for group in range(num_groups):
        part = slice(group * size, (group + 1) * size)
        numbers = codes[:, part].double()
        if weight.zeros is not None:
            numbers = numbers - weight.zeros[:, group, None]
        total += rows[:, part].double() @ numbers.T * weight.scales[:, group]
    product = (total * row_scales).float()
    return product if bias is None else product + bias.float()


def expert_of(weights: QuantizedExperts, expert: int) -> tuple[QuantizedWeight, QuantizedWeight]:
    """Return one expert's weights: of gate and up, and down."""
    return _entry(weights.gate_up, expert), _entry(weights.down, expert)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes of rows, as float32, and their scales, [N, 1]. What is not finite leaves a scale of NaN."""
    peaks = x.abs().amax(dim=-1, keepdim=True)
    scales = peaks.where(peaks.isfinite(), torch.nan) / _LARGEST_CODE
    scales = scales.masked_fill(scales == 0, 1.0)
    return torch.round(x / scales), scales


def _codes(weight: QuantizedWeight, size: int) -> torch.Tensor:
    """Return the codes one by one, [O, I]; those of 4 bits without zero points as their distance from the middle."""
    if weight.scheme.bits == 8:
        return weight.codes
    halves = weight.codes.reshape(len(weight.codes), -1, size // 2)
    codes = torch.stack((halves % 16, halves // 16), dim=-2).flatten(-3)
    return codes if weight.zeros is not None else codes.to(torch.int8) - _MIDDLE


def _entry(stack: QuantizedWeight, index: int) -> QuantizedWeight:
    zeros = None if stack.zeros is None else stack.zeros[index]
    return QuantizedWeight(stack.scheme, stack.codes[index], stack.scales[index], zeros)
