"""Products with weights held as integers, by the native library: the part of `NativeOps` for them.

What the library does not serve goes to the reference: 8-bit activations with several scales per output, other dtypes.
"""

from ctypes import CDLL, byref
from struct import Struct
from typing import NamedTuple

import torch
from torch.compiler import is_compiling

from zif.contract import Activation, QuantizedExperts, QuantizedWeight, RouterOutput, WeightScheme
from zif.reference.ops import ReferenceOps
from zif_cpu import compiled
from zif_cpu.arguments import ACTIVATIONS, FLOAT32, address_of, code_of, fits, is_plain, row_stride
from zif_cpu.library import QuantizedCall, QuantizedExpertsCall

MAX_EXACT_INPUTS = 131072
"""Up to as many products of two 8-bit codes have a sum that 32 bits hold."""

_product = Struct("3P3q2i3P2q2i").pack  # zif_cpu_quantized_product of zif_cpu.h
_gated_product = Struct("3P3q2i3P2q2iq").pack  # the same with an activation, and what fills the struct up

Held = tuple[int, int, int, int, int, int, int, int]
"""The fields of `zif_cpu_quantized`, in order."""


class QuantizedOps(ReferenceOps):
    """Native where the library serves the arguments, else the reference."""

    def _take_quantized(self, raw: CDLL) -> None:
        self._quantized_linear_kernel = raw.zif_cpu_quantized_linear
        self._gated_quantized_linear_kernel = raw.zif_cpu_gated_quantized_linear
        self._quantized_experts_kernel = raw.zif_cpu_quantized_experts

    def quantized_linear(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        if is_compiling():
            return compiled.quantized_linear(x, weight, bias)
        return self._quantized_linear(x, weight, bias)

    def quantized_experts(
        self, x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        if is_compiling():
            return compiled.quantized_experts(x, weights, routed, activation)
        return self._quantized_experts(x, weights, routed, activation)

    def quantized_logits(
        self, hidden: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        call = None if is_compiling() else _product_of(hidden, weight, bias)
        if call is None:
            return super().quantized_linear(hidden.float(), weight, None if bias is None else bias.float())
        y = torch.empty(len(hidden), len(weight.codes), dtype=torch.float32)
        self._quantized_linear_kernel(_product(*call.before, y.data_ptr(), *call.after, True))
        return y

    def _quantized_linear(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        call = _product_of(x, weight, bias)
        if call is None:
            return super().quantized_linear(x, weight, bias)
        y = x.new_empty(len(x), len(weight.codes))
        self._quantized_linear_kernel(_product(*call.before, y.data_ptr(), *call.after, False))
        return y

    def _gated_quantized_linear(
        self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor | None:
        """Return None where `_quantized_linear` would not be native, or there is nothing to gate."""
        call = _product_of(x, weight, bias)
        if call is None or len(weight.codes) % 2:
            return None
        y = x.new_empty(len(x), len(weight.codes) // 2)
        after = *call.after, False, ACTIVATIONS[activation]
        self._gated_quantized_linear_kernel(_gated_product(*call.before, y.data_ptr(), *after))
        return y

    def _quantized_experts(
        self, x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        call = _experts_call(x, weights, routed, activation)
        if call is None:
            return super().quantized_experts(x, weights, routed, activation)
        y = torch.empty_like(x)
        call.y = y.data_ptr()
        if self._quantized_experts_kernel(byref(call)):
            return super().quantized_experts(x, weights, routed, activation)  # which says what is wrong with the ids
        return y


class _Call(NamedTuple):
    """The fields of `zif_cpu_quantized_product` before its result and after it."""

    before: tuple[int, ...]
    after: tuple[int, int, int]


def _product_of(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> _Call | None:
    """Return the call of a product, or None where the library does not serve the arguments."""
    shape, code = x.shape, code_of(x, x)
    rows = weight.codes.shape[:-1]
    if (
        code is None
        or len(shape) != 2
        or len(rows) != 1
        or not (stride := row_stride(x, shape))
        or (held := _held(weight, rows, shape[1])) is None
        or not fits(bias, x, rows)
    ):
        return None
    return _Call((*held, x.data_ptr(), 0 if bias is None else bias.data_ptr()), (stride, shape[0], code))


def serves(scheme: WeightScheme, inputs: int) -> bool:
    """Whether the library multiplies weights of this scheme that have so many inputs."""
    group = scheme.group_size or inputs
    if scheme.dynamic_activations:
        return scheme.bits == 8 and group == inputs <= MAX_EXACT_INPUTS and not scheme.zero_points
    return scheme.bits == 8 or group % 2 == 0


def _held(weight: QuantizedWeight, rows: tuple[int, ...], inputs: int) -> Held | None:
    """Return the fields of a weight, [*rows, inputs], or None where the library does not serve it."""
    scheme, codes, scales, zeros = weight.scheme, weight.codes, weight.scales, weight.zeros
    group = scheme.group_size or inputs
    if inputs % group or not serves(scheme, inputs) or (zeros is None) == scheme.zero_points:
        return None
    dtype, width = (torch.int8, inputs) if scheme.bits == 8 else (torch.uint8, inputs // 2)
    groups = (*rows, inputs // group)
    if not (_lies(codes, dtype, (*rows, width)) and _lies(scales, torch.float32, groups)):
        return None
    if zeros is not None and not _lies(zeros, torch.int16, groups):
        return None
    addresses = codes.data_ptr(), scales.data_ptr(), 0 if zeros is None else zeros.data_ptr()
    return (*addresses, rows[-1], inputs, group, scheme.bits, int(scheme.dynamic_activations))


def _lies(array: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether an array has this dtype and shape, dense, in this process's memory, with something in it."""
    fitting = array.dtype is dtype and array.shape == shape and array.is_contiguous() and is_plain(array)
    return fitting and array.numel() > 0


def _experts_call(
    x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
) -> QuantizedExpertsCall | None:
    """Return the call without its output, or None where the library does not serve the arguments."""
    code, ids, shares = code_of(x, x), routed.expert_ids, routed.weights
    rows, stride = weights.down.codes.shape[:-1], row_stride(x, x.shape)
    gate_rows = weights.gate_up.codes.shape[:-1]
    if code is None or x.dim() != 2 or not stride or len(rows) != 2 or len(gate_rows) != 2 or ids.dim() != 2:
        return None
    (tokens, channels), (experts, outputs), inner = x.shape, rows, gate_rows[1] // 2
    chosen = ids.shape[1]
    gate_up = _held(weights.gate_up, (experts, 2 * inner), channels)
    down = _held(weights.down, (experts, channels), inner) if inner else None
    served = (
        fits(weights.gate_up_bias, x, (experts, 2 * inner))
        and fits(weights.down_bias, x, (experts, channels))
        and code_of(shares, shares) == FLOAT32
        and outputs == channels
        and shares.shape == ids.shape == (tokens, chosen)
        and ids.dtype is torch.int64
        and is_plain(ids)
        and shares.is_contiguous()
        and ids.is_contiguous()
    )
    if not served or not chosen or gate_up is None or down is None:
        return None
    return QuantizedExpertsCall(
        gate_up=QuantizedCall(*gate_up),
        down=QuantizedCall(*down),
        x=x.data_ptr(),
        gate_up_bias=address_of(weights.gate_up_bias),
        down_bias=address_of(weights.down_bias),
        weights=shares.data_ptr(),
        ids=ids.data_ptr(),
        x_stride=stride,
        tokens=tokens,
        experts=experts,
        chosen=chosen,
        activation=ACTIVATIONS[activation],
        dtype=code,
    )
