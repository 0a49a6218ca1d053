"""Arrays as the integers of their bits, in a compiled program.

Two reasons. XLA's compiler for host processors has no scatter in bfloat16: it widens the whole operand to float32 and
back, which for a KV cache is a copy of all of it, twice, in every layer; integers of 16 bits it updates in place. And
memory that is lent as bytes is read and written as bytes, because torch_xla sees an array as another type only by
copying it to the host.
"""

from collections.abc import Callable

import torch
from torch_xla.core.xla_builder import Op, Type
from torch_xla.core.xla_op_registry import register

_TYPES = {torch.float32: Type.F32, torch.bfloat16: Type.BF16, torch.int16: Type.S16, torch.uint8: Type.U8}


def _register(name: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    def convert(x: Op) -> Op:
        return x.bitcast(_TYPES[dtype])

    registered: Callable[[torch.Tensor], torch.Tensor] = register(f"zif_bits_as_{name}", convert)
    return registered


_AS = {dtype: _register(str(dtype).removeprefix("torch."), dtype) for dtype in _TYPES}


def stored_dtype(dtype: torch.dtype, pjrt_device: str) -> torch.dtype:
    """Return the type of the array that keeps KV of `dtype`."""
    return torch.int16 if dtype == torch.bfloat16 and pjrt_device == "CPU" else dtype


def encoded(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Return the bits of values [..., D] as `stored`: [..., D * (their size / stored size)]."""
    if values.dtype == stored:
        return values
    return _AS[stored](values).reshape(*values.shape[:-1], -1)


def decoded(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values of `dtype` whose bits are [..., N]: [..., N * (their size / size of `dtype`)]."""
    if bits.dtype == dtype:
        return bits
    ratio = dtype.itemsize // bits.dtype.itemsize
    grouped = bits if ratio == 1 else bits.reshape(*bits.shape[:-1], -1, ratio)
    return _AS[dtype](grouped)
