"""The operators that the native library serves; what it does not serve is the reference's.

It serves arrays of one dtype that it has kernels for, in this process's memory, dense but for their first axis.
Anything else goes to torch: other dtypes, views with gaps, fake arrays, empty ones, shapes that do not fit, so that
errors are the reference's too. For inference: nothing here keeps what a gradient would need.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from ctypes import byref
from struct import Struct
from types import MappingProxyType
from typing import cast

import torch
from torch.compiler import is_compiling
from torch.nn import functional

from zif.contract import (
    Activation,
    ChosenTokens,
    DrawOptions,
    ExpertWeights,
    NormOutput,
    QuantizedWeight,
    RotatedHeads,
    RouterOutput,
)
from zif_cpu import compiled
from zif_cpu.arguments import ACTIVATIONS, FLOAT32, address_of, code_of, fits, is_vector, row_stride
from zif_cpu.choices import choose_tokens
from zif_cpu.compact import CompactWeight, addresses_of, compact_weight
from zif_cpu.library import DTYPE_CODES, ExpertsCall, Library
from zif_cpu.quantized import QuantizedOps
from zif_cpu.recording import Recorder

MAX_TOKENS = 64
"""Up to as many tokens `linear` is native: beyond, weights are read once for many, and torch's products are faster."""

MAX_TOKENS_PER_EXPERT = 64
"""The same for the tokens of an expert, with instructions for 16-bit products but no tiles: torch is much faster."""

_ANY_NUMBER = 1 << 30
MAX_TOKENS_BY_ISA: Mapping[tuple[str, str], int] = MappingProxyType(
    {
        ("amx", "bfloat16"): _ANY_NUMBER,
        # Processors without 16-bit products: torch widens too, and is three times as slow at it.
        **dict.fromkeys(itertools.product(("avx2", "avx512", "avx512_vnni"), ("bfloat16", "float16")), _ANY_NUMBER),
    }
)
"""Where it is another number: (instruction set, dtype)."""


COMPACT_OUTPUTS: Mapping[str, int] = MappingProxyType({"avx512": 32, "avx512_vnni": 32, "amx": 1})
"""Instruction sets that multiply matrices in 12 bits, and what the number of outputs must be a multiple of."""

Matrix = torch.Tensor | CompactWeight
"""A weight of `linear`, `gated_linear` and `logits`."""

# The structs of zif_cpu.h. Packed into bytes they cost a call 0.4 us; the same values as arguments cost 1.9 to 2.8.
_norm = Struct("5P5q2fi").pack
_rotation = Struct("6P7q2i").pack
_gating = Struct("2P3q2i").pack
_product = Struct("4P4q2iP").pack
_gated_product = Struct("4P4q2iPq").pack  # the activation, and what fills the struct up


class NativeOps(QuantizedOps):
    """Native where the library serves the arguments, else the reference. `isa` is the instruction set in use.

    With `batch_invariant` all products are native: the library sums in one order for any number of tokens, torch
    does not.
    Within `torch.compile` methods are nodes of the graph, which run the same code (`zif_cpu.compiled`); a gated product
    is two, and prepared weights break the graph.
    """

    def __init__(self, library: Library, isa: str, *, batch_invariant: bool = False) -> None:
        raw = self._raw = library.raw
        self._linear_kernel = raw.zif_cpu_linear
        self._gated_linear_kernel = raw.zif_cpu_gated_linear
        self._rms_norm_kernel = raw.zif_cpu_rms_norm
        self._add_rms_norm_kernel = raw.zif_cpu_add_rms_norm
        self._rotate_kernel = raw.zif_cpu_rotate
        self._gated_activation_kernel = raw.zif_cpu_gated_activation
        self._experts_kernel = raw.zif_cpu_experts
        self._unpack_kernel = raw.zif_cpu_unpack_weight
        self._take_quantized(raw)
        self._limits_experts = isa == "avx512_bf16" and not batch_invariant
        self._max_tokens = {
            code: _ANY_NUMBER if batch_invariant else MAX_TOKENS_BY_ISA.get((isa, dtype), MAX_TOKENS)
            for dtype, code in DTYPE_CODES.items()
        }
        self._compact_outputs = COMPACT_OUTPUTS.get(isa)
        compiled.register(
            compiled.Eager(
                self._linear,
                self._rms_norm,
                self._add_rms_norm,
                self._rotate,
                self._gated_activation,
                self._experts,
                self._quantized_linear,
                self._quantized_experts,
            )
        )

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Let `recorder` hear the native calls that are made within the context."""
        kernels = {name: kernel for name, kernel in vars(self).items() if name.endswith("_kernel")}
        try:
            for name, kernel in kernels.items():
                setattr(self, name, recorder.heard(kernel))
            yield
        finally:
            vars(self).update(kernels)

    def prepare_weight(self, weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor | None:
        if self._compact_outputs is None or weight.dim() != 2 or weight.shape[0] % self._compact_outputs:
            return None
        # A tensor to type checkers: core hands it to the operators below, and looks into none.
        return cast(torch.Tensor | None, compact_weight(self._raw, weight, allocate))

    def linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        if is_compiling():
            return compiled.linear(x, self._plain(weight), bias)
        return self._linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        if is_compiling():
            return compiled.rms_norm(x, weight, eps, weight_offset)
        return self._rms_norm(x, weight, eps, weight_offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        if is_compiling():
            return compiled.add_rms_norm(x, residual, weight, eps, weight_offset)
        return self._add_rms_norm(x, residual, weight, eps, weight_offset)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        if is_compiling():
            return compiled.rotate(query, key, cos, sin, interleaved)
        return self._rotate(query, key, cos, sin, interleaved)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if is_compiling():
            return compiled.gated_activation(gate_up, activation)
        return self._gated_activation(gate_up, activation)

    def gated_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None,
        activation: Activation,
    ) -> torch.Tensor:
        if isinstance(weight, QuantizedWeight):
            y = None if is_compiling() else self._gated_quantized_linear(x, weight, bias, activation)
        else:
            y = None if is_compiling() else self._gated_linear(x, weight, bias, activation)
        return super().gated_linear(x, weight, bias, activation) if y is None else y

    def experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        if is_compiling():
            return compiled.experts(x, weights, routed, activation)
        return self._experts(x, weights, routed, activation)

    def logits(self, hidden: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        stride, code = (0, 0) if is_compiling() else _served(hidden, weight, bias)
        if not stride:
            return functional.linear(
                hidden.float(), self._plain(weight).float(), None if bias is None else bias.float()
            )
        (tokens, inputs), outputs = hidden.shape, weight.shape[0]
        y = torch.empty(tokens, outputs, dtype=torch.float32)
        address, compact = addresses_of(weight)
        arrays = hidden.data_ptr(), address, 0 if bias is None else bias.data_ptr(), y.data_ptr()
        self._linear_kernel(_product(*arrays, stride, tokens, inputs, outputs, code, True, compact))
        return y

    def choose_tokens(self, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens | None:
        return choose_tokens(self._raw, logits, options)

    def _linear(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        stride, code = _served(x, weight, bias)
        if not stride or x.shape[0] > self._max_tokens[code]:
            return super().linear(x, self._plain(weight), bias)
        (tokens, inputs), outputs = x.shape, weight.shape[0]
        y = x.new_empty(tokens, outputs)
        address, compact = addresses_of(weight)
        arrays = x.data_ptr(), address, 0 if bias is None else bias.data_ptr(), y.data_ptr()
        self._linear_kernel(_product(*arrays, stride, tokens, inputs, outputs, code, False, compact))
        return y

    def _plain(self, weight: Matrix) -> torch.Tensor:
        """Return the matrix itself, for what only torch computes."""
        if not isinstance(weight, CompactWeight):
            return weight
        unpacked = torch.empty(weight.shape, dtype=torch.bfloat16)
        self._unpack_kernel(weight.unpacking(unpacked))
        return unpacked

    def _gated_linear(
        self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, activation: Activation
    ) -> torch.Tensor | None:
        """Return None where `_linear` would not be native, or there is nothing to gate."""
        stride, code = _served(x, weight, bias)
        if not stride or x.shape[0] > self._max_tokens[code] or weight.shape[0] % 2:
            return None
        (tokens, inputs), outputs = x.shape, weight.shape[0]
        y = x.new_empty(tokens, outputs // 2)
        address, compact = addresses_of(weight)
        arrays = x.data_ptr(), address, 0 if bias is None else bias.data_ptr(), y.data_ptr()
        sizes = stride, tokens, inputs, outputs
        self._gated_linear_kernel(_gated_product(*arrays, *sizes, code, False, compact, ACTIVATIONS[activation]))
        return y

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        shape = x.shape
        code = code_of(x, weight)
        if code is None or not (stride := row_stride(x, shape)) or not is_vector(weight, shape[-1]):
            return super().rms_norm(x, weight, eps, weight_offset)
        rows, channels = shape[0], shape[-1]
        heads = 1 if len(shape) == 2 else x.numel() // (rows * channels)
        y = torch.empty_like(x)
        arrays = x.data_ptr(), 0, weight.data_ptr(), 0, y.data_ptr()
        self._rms_norm_kernel(_norm(*arrays, stride, 0, rows, heads, channels, eps, weight_offset, code))
        return y

    def _add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        shape = x.shape
        code = code_of(x, weight)
        if (
            code is None
            or code != code_of(residual, weight)
            or residual.shape != shape
            or not (stride := row_stride(x, shape))
            or not (residual_stride := row_stride(residual, shape))
            or not is_vector(weight, shape[-1])
        ):
            return super().add_rms_norm(x, residual, weight, eps, weight_offset)
        rows, channels = shape[0], shape[-1]
        heads = 1 if len(shape) == 2 else x.numel() // (rows * channels)
        y, total = torch.empty_like(x), torch.empty_like(x)
        arrays = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), total.data_ptr(), y.data_ptr()
        sizes = stride, residual_stride, rows, heads, channels
        self._add_rms_norm_kernel(_norm(*arrays, *sizes, eps, weight_offset, code))
        return NormOutput(y, total)

    def _rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        shape, key_shape, angles = query.shape, key.shape, cos.shape
        code = code_of(query, key)
        if (
            code is None
            or not len(shape) == len(key_shape) == 3
            or shape[0] != key_shape[0]
            or shape[2] != key_shape[2]
            or not (query_stride := row_stride(query, shape))
            or not (key_stride := row_stride(key, key_shape))
            or code_of(cos, sin) != FLOAT32
            or sin.shape != angles
            or not (cos.is_contiguous() and sin.is_contiguous())
            or len(angles) != 2
            or angles[0] != shape[0]
            or 2 * angles[1] > shape[2]
        ):
            return super().rotate(query, key, cos, sin, interleaved)
        query_out, key_out = torch.empty_like(query), torch.empty_like(key)
        arrays = query.data_ptr(), key.data_ptr(), cos.data_ptr(), sin.data_ptr(), query_out.data_ptr()
        sizes = query_stride, key_stride, *shape[:2], key_shape[1], shape[2], angles[1]
        self._rotate_kernel(_rotation(*arrays, key_out.data_ptr(), *sizes, interleaved, code))
        return RotatedHeads(query_out, key_out)

    def _gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        shape = gate_up.shape
        code = code_of(gate_up, gate_up)
        if code is None or not (stride := row_stride(gate_up, shape)) or shape[-1] % 2:
            return super().gated_activation(gate_up, activation)
        channels = shape[-1] // 2
        rows = shape[0]
        if len(shape) != 2:
            if not gate_up.is_contiguous():
                return super().gated_activation(gate_up, activation)
            rows, stride = gate_up.numel() // shape[-1], shape[-1]
        y = gate_up.new_empty(*shape[:-1], channels)
        arrays = gate_up.data_ptr(), y.data_ptr()
        self._gated_activation_kernel(_gating(*arrays, stride, rows, channels, ACTIVATIONS[activation], code))
        return y

    def _experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        call = _experts_call(x, weights, routed, activation)
        if call is None or (self._limits_experts and call.tokens * call.chosen > MAX_TOKENS_PER_EXPERT * call.experts):
            return super().experts(x, weights, routed, activation)
        y = torch.empty_like(x)
        call.y = y.data_ptr()
        if self._experts_kernel(byref(call)):
            return super().experts(x, weights, routed, activation)  # which says what is wrong with the ids
        return y


def _served(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None) -> tuple[int, int]:
    """Return the stride of x and the dtype's code where the library multiplies these, else a stride of 0."""
    shape, weight_shape = x.shape, weight.shape
    if isinstance(weight, CompactWeight):
        code, is_dense = code_of(x, x), x.dtype is torch.bfloat16
    else:
        code, is_dense = code_of(x, weight), weight.is_contiguous()
    if (
        code is None
        or not is_dense
        or not len(shape) == len(weight_shape) == 2
        or shape[1] != weight_shape[1]
        or not fits(bias, x, weight_shape[:1])
    ):
        return 0, 0
    return row_stride(x, shape), code


def _experts_call(
    x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
) -> ExpertsCall | None:
    """Return the call without its output, or None where the library does not serve the arguments."""
    code, ids, shares = code_of(x, weights.gate_up), routed.expert_ids, routed.weights
    stride = row_stride(x, x.shape)
    if code is None or x.dim() != 2 or not stride or weights.down.dim() != 3 or ids.dim() != 2:
        return None
    (tokens, channels), (experts, _, inner) = x.shape, weights.down.shape
    chosen = ids.shape[1]
    served = (
        fits(weights.gate_up, x, (experts, 2 * inner, channels))
        and fits(weights.down, x, (experts, channels, inner))
        and fits(weights.gate_up_bias, x, (experts, 2 * inner))
        and fits(weights.down_bias, x, (experts, channels))
        and code_of(shares, shares) == FLOAT32
        and shares.shape == ids.shape == (tokens, chosen)
        and ids.dtype is torch.int64
        and ids.is_cpu
        and shares.is_contiguous()
        and ids.is_contiguous()
    )
    if not served or not chosen or not inner:
        return None
    return ExpertsCall(
        x=x.data_ptr(),
        gate_up=weights.gate_up.data_ptr(),
        gate_up_bias=address_of(weights.gate_up_bias),
        down=weights.down.data_ptr(),
        down_bias=address_of(weights.down_bias),
        weights=shares.data_ptr(),
        ids=ids.data_ptr(),
        x_stride=stride,
        tokens=tokens,
        channels=channels,
        inner=inner,
        experts=experts,
        chosen=chosen,
        activation=ACTIVATIONS[activation],
        dtype=code,
    )
