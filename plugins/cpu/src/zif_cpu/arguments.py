"""What a native call is told of its arguments: dtypes, strides, addresses. Called by the operators."""

from types import MappingProxyType

import torch

from zif.contract import Activation
from zif_cpu.library import ACTIVATION_CODES, DTYPE_CODES

_CODES = MappingProxyType({getattr(torch, name): code for name, code in DTYPE_CODES.items()})
ACTIVATIONS = MappingProxyType({Activation(name): code for name, code in ACTIVATION_CODES.items()})
FLOAT32 = _CODES[torch.float32]
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))  # a subclass may have no memory, as fake arrays


def is_plain(array: torch.Tensor) -> bool:
    """Whether an array is in this process's memory as its shape and strides say."""
    return type(array) in _PLAIN and array.is_cpu and not array.is_neg()


def code_of(x: torch.Tensor, other: torch.Tensor) -> int | None:
    """Return the code of the dtype of both, or None where they differ or the library does not serve them."""
    if is_plain(x) and is_plain(other):
        dtype = x.dtype
        if other.dtype is dtype:
            return _CODES.get(dtype)
    return None


def row_stride(x: torch.Tensor, shape: torch.Size) -> int:
    """Return the elements from one row, an entry of the first axis, to the next, or 0 where rows are not dense.

    Also 0 where there are none, or where they overlap, because `empty_like` then gives no dense array.
    """
    size = x.numel()
    if not size or len(shape) < 2:
        return 0
    row = size // shape[0]
    if x.is_contiguous():
        return row
    strides, dense = x.stride(), 1
    for axis in range(len(shape) - 1, 0, -1):
        if strides[axis] != dense and shape[axis] != 1:
            return 0
        dense *= shape[axis]
    return strides[0] if strides[0] >= row else 0


def is_vector(weight: torch.Tensor, size: int) -> bool:
    return weight.dim() == 1 and weight.numel() == size and weight.is_contiguous()


def fits(array: torch.Tensor | None, x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether an array has this shape and x's dtype, dense. None, an array that is not given, fits."""
    return array is None or (code_of(array, x) is not None and array.shape == shape and array.is_contiguous())


def address_of(array: torch.Tensor | None) -> int | None:
    return None if array is None else array.data_ptr()
