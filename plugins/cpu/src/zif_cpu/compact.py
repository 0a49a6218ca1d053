"""Weights of bfloat16 in 12 bits, without loss: decoding waits for memory, and reads three quarters of the bytes.

The format is that of `zif_cpu_compact` (native/kernels/compact.h). A matrix whose numbers need many exceptions stays as
it is. Called by the operators.
"""

import ctypes
from collections.abc import Callable

import torch

from zif_cpu.arguments import is_plain

PIECE_INPUTS = 128
"""Inputs of a compact weight are a multiple of it."""

_GROUP_ROWS = 16
_NUMBERS_PER_EXCEPTION = 256
"""There is room for one exception per so many numbers."""

_ALIGNMENT = 64


class _Compact(ctypes.Structure):
    """`zif_cpu_compact` of the C ABI."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("exceptions", ctypes.c_void_p),
        ("uppers", ctypes.c_uint8 * 16),
        ("made_by", ctypes.c_void_p),
    )


class _Compaction(ctypes.Structure):
    """`zif_cpu_compaction` of the C ABI."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("compact", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "capacity")),
    )


class CompactWeight:
    """What `prepare_weight` of the operators returns: a matrix [O, I], read by native products only.

    shape: of the matrix. address: of its struct. Keeps its memory.
    """

    __slots__ = ("_memory", "_struct", "address", "shape")

    def __init__(self, shape: torch.Size, memory: torch.Tensor, struct: _Compact) -> None:
        self._memory = memory
        self._struct = struct
        self.shape = shape
        self.address = ctypes.addressof(struct)

    def unpacking(self, weight: torch.Tensor) -> bytes:
        """Return the struct of the call that fills `weight`, [O, I], bfloat16, with the matrix."""
        return bytes(_Compaction(weight.data_ptr(), self.address, *self.shape, 0))


def compact_weight(
    raw: ctypes.CDLL, weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]
) -> CompactWeight | None:
    """Return a matrix in 12 bits per number, or None where it is not fit for that. Reads `weight` once."""
    if not (is_plain(weight) and weight.dtype is torch.bfloat16 and weight.dim() == 2 and weight.is_contiguous()):
        return None
    outputs, inputs = weight.shape
    if not outputs or not inputs or inputs % PIECE_INPUTS:
        return None
    capacity = outputs * inputs // _NUMBERS_PER_EXCEPTION
    pieces = -(-outputs // _GROUP_ROWS) * (inputs // PIECE_INPUTS)
    sizes = [_aligned(outputs * inputs // 2 * 3), _aligned((pieces + 1) * 4), _aligned(capacity * 4)]
    memory = allocate(sum(sizes))
    rows = memory.data_ptr()
    struct = _Compact(rows, rows + sizes[0], rows + sizes[0] + sizes[1])
    compact = CompactWeight(weight.shape, memory, struct)
    call = _Compaction(weight.data_ptr(), compact.address, outputs, inputs, capacity)
    return None if raw.zif_cpu_compact_weight(ctypes.byref(call)) else compact


def addresses_of(weight: torch.Tensor | CompactWeight) -> tuple[int, int]:
    """Return the addresses of a matrix and of its compact form, one of which is 0."""
    return (0, weight.address) if isinstance(weight, CompactWeight) else (weight.data_ptr(), 0)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
