"""What the decoder holds, as values: tensors, the pieces they are filled from, and the stored tensors behind those.

Pure bookkeeping on names and shapes; nothing is read and no array library is imported. Made by `zif.models.layout`,
used by description (bytes) and loading.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from zif.contract import WeightScheme

FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes in which numbers that are no codes are stored, by torch's name."""

BYTES = ("uint8",)
"""The dtype of packed blocks and their scales."""

_SCALE_BYTES, _ZERO_BYTES = 4, 2


class Arrangement(StrEnum):
    """How stored elements are ordered, relative to how they are held.

    AS_STORED: the same. TRANSPOSED: last two axes swapped. INTERLEAVED: gate and up alternate along the last axis,
    held one after the other. INTERLEAVED_TRANSPOSED: both. MXFP4: packed blocks of 4-bit elements with scales.
    MXFP4_INTERLEAVED: packed, gate and up rows alternate. The others are codes with scales: INT8_CODES one by one,
    PACKED_CODES in words along the inputs, GPTQ_CODES the same with inputs first and zeros less one, GPTQ_V2_CODES with
    zeros as they are, AWQ_CODES in words along the outputs.
    """

    AS_STORED = "as_stored"
    TRANSPOSED = "transposed"
    INTERLEAVED = "interleaved"
    INTERLEAVED_TRANSPOSED = "interleaved_transposed"
    MXFP4 = "mxfp4"
    MXFP4_INTERLEAVED = "mxfp4_interleaved"
    INT8_CODES = "int8_codes"
    PACKED_CODES = "packed_codes"
    GPTQ_CODES = "gptq_codes"
    GPTQ_V2_CODES = "gptq_v2_codes"
    AWQ_CODES = "awq_codes"


CODE_ARRANGEMENTS = (
    Arrangement.INT8_CODES,
    Arrangement.PACKED_CODES,
    Arrangement.GPTQ_CODES,
    Arrangement.GPTQ_V2_CODES,
    Arrangement.AWQ_CODES,
)
"""Those whose elements are codes already; what is stored otherwise is numbers."""


@dataclass(frozen=True, slots=True)
class Source:
    """One stored tensor that is needed, the shape it must have, and the dtypes it may have."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of a held tensor, from `offset` on, out of one stored tensor, or of codes and what belongs to
    them, which the last parts of their names tell apart."""

    sources: tuple[Source, ...]
    offset: int
    arrangement: Arrangement = Arrangement.AS_STORED


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor of the decoder. `name` is the decoder's own: "layers.3.qkv". `scheme` where codes are held."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    scheme: WeightScheme | None = None

    @property
    def num_elements(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)

    @property
    def num_groups(self) -> int:
        """Count the scales of an output."""
        group_size = self.scheme.group_size if self.scheme else None
        return self.shape[-1] // group_size if group_size else 1

    def num_bytes(self, element_bytes: int) -> int:
        """Count the bytes held: elements of the model dtype, or codes with scales and zeros."""
        if self.scheme is None:
            return self.num_elements * element_bytes
        num_scales = self.num_elements // self.shape[-1] * self.num_groups
        scale_bytes = _SCALE_BYTES + (_ZERO_BYTES if self.scheme.zero_points else 0)
        return self.num_elements * self.scheme.bits // 8 + num_scales * scale_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All tensors of a decoder. `repeats_embedding` when a tied checkpoint stores the output matrix once more.

    `zero_biases`: stored biases that the architecture does not have, and that must be nothing but zeros.
    """

    tensors: tuple[HeldTensor, ...]
    repeats_embedding: bool
    zero_biases: tuple[str, ...] = ()

    def num_bytes(self, element_bytes: int) -> int:
        """Count the bytes of all tensors as they are held."""
        return sum(tensor.num_bytes(element_bytes) for tensor in self.tensors)

    @property
    def schemes(self) -> tuple[WeightScheme, ...]:
        """The distinct schemes in which weights are held, in the order of first use."""
        return tuple(dict.fromkeys(tensor.scheme for tensor in self.tensors if tensor.scheme is not None))

    @property
    def is_packed(self) -> bool:
        """Say whether MXFP4 blocks are unpacked on load."""
        packed = (Arrangement.MXFP4, Arrangement.MXFP4_INTERLEAVED)
        return any(piece.arrangement in packed for tensor in self.tensors for piece in tensor.pieces)
