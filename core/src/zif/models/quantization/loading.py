"""Fills held codes and scales: from stored codes, or from stored numbers that are rounded on the way.

Parts of a few megabytes go through memory of their own, or one matrix at a time where a file has inputs first; so the
peak is what is held and one such part. Called by `zif.models.weights`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from zif.contract import QuantizedWeight, WeightScheme
from zif.errors import CheckpointError
from zif.models.dense_weights import arrange_entry, check_range
from zif.models.held import CODE_ARRANGEMENTS, Arrangement, Layout, Piece
from zif.models.quantization.rounding import Rounder
from zif.models.quantization.unpacking import (
    held_awq_codes,
    held_codes,
    held_zeros,
    unpack_awq_words,
    unpack_words,
)
from zif.models.tensor_files import CHUNK_BYTES, TensorFiles, stored_dtype

_OUTPUTS_AT_ONCE = 512
"""Of a matrix stored with inputs first: a multiple of the codes in a word, and a copy that stays in cache."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The outputs of one piece in a held weight. codes: [O, I] or [O, I / 2]. scales, zeros: [O, G]."""

    scheme: WeightScheme
    num_inputs: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def fill_codes(files: TensorFiles, held: QuantizedWeight, piece: Piece) -> Iterator[int]:
    """Put one piece in its place; yield the number of elements after each part. held: the whole held weight."""
    if piece.arrangement in CODE_ARRANGEMENTS:
        yield from _fill_stored(files, held, piece)
    elif piece.arrangement == Arrangement.AS_STORED:
        yield from _round_rows(files, held, piece)
    else:
        num_inputs = _num_inputs(held)
        for index in range(held.codes.shape[0]):
            entry = torch.empty(held.codes.shape[1], num_inputs)
            arrange_entry(files, entry, piece, index)
            rows = _rows(held, index * entry.numel(), entry.shape[0])
            Rounder(held.scheme, num_inputs).round(entry, rows.codes, rows.scales)
            yield entry.numel()


def check_order(files: TensorFiles, layout: Layout) -> None:
    """Raise `CheckpointError` where stored codes lie in another order or shape than they are read in.

    Reads only the small tensors that say so, before any weight.
    """
    for held in layout.tensors:
        for piece in held.pieces if held.scheme else ():
            for source in piece.sources:
                if source.name.endswith(".g_idx"):
                    group_size = held.scheme.group_size if held.scheme else None
                    _check_groups(files, source.name, group_size)
                elif source.name.endswith(".weight_shape"):
                    _check_shape(files, source.name, (piece.sources[0].shape[0], held.shape[-1]))


def _check_groups(files: TensorFiles, name: str, group_size: int | None) -> None:
    groups = files.read_all(name)
    in_order = torch.arange(groups.numel()) // (group_size or groups.numel())
    if not torch.equal(groups.long(), in_order):
        raise CheckpointError(
            f"{name!r} spreads the inputs of a group over the matrix (act order), which is not implemented; use a "
            "checkpoint with desc_act=False"
        )


def _check_shape(files: TensorFiles, name: str, expected: tuple[int, int]) -> None:
    stated = tuple(files.read_all(name).tolist())
    if stated != expected:
        raise CheckpointError(
            f"{name!r} says {list(stated)} instead of {list(expected)}; use the config.json that belongs to these "
            "weights"
        )


def _round_rows(files: TensorFiles, held: QuantizedWeight, piece: Piece) -> Iterator[int]:
    stored = files.stored(piece.sources[0].name)
    num_outputs, num_inputs = stored.shape
    rows, dtype = _rows(held, piece.offset, num_outputs), stored_dtype(stored)
    rounder = Rounder(held.scheme, num_inputs)
    step = min(num_outputs, max(1, CHUNK_BYTES // (num_inputs * dtype.itemsize)))
    staging = torch.empty(step, num_inputs, dtype=dtype)
    for start in range(0, num_outputs, step):
        part = staging[: min(step, num_outputs - start)]
        files.read(stored, start * num_inputs * dtype.itemsize, part)
        check_range(stored, part, torch.float32)
        outputs = slice(start, start + part.shape[0])
        rounder.round(part, rows.codes[outputs], rows.scales[outputs])
        yield part.numel()


def _fill_stored(files: TensorFiles, held: QuantizedWeight, piece: Piece) -> Iterator[int]:
    names = {source.name.rsplit(".", 1)[-1]: source.name for source in piece.sources}
    scales = files.read_all(names.get("weight_scale") or names["scales"])
    has_inputs_first = "scales" in names
    scales = scales.T if has_inputs_first else scales
    rows = _rows(held, piece.offset, scales.shape[0])
    rows.scales.copy_(scales)
    zeros = _stored_zeros(files, names, piece.arrangement, rows)
    if rows.zeros is not None and zeros is not None:
        rows.zeros.copy_(zeros)
    elif zeros is not None and not torch.all(zeros == (0 if rows.scheme.bits == 8 else 8)):
        raise CheckpointError(
            f"{names['qzeros']!r} has zeros off the middle, but config.json says sym=true; correct config.json"
        )
    match piece.arrangement:
        case Arrangement.INT8_CODES:
            yield from _copy_codes(files, names["weight"], rows)
        case Arrangement.PACKED_CODES:
            yield from _unpack_rows(files, names["weight_packed"], rows)
        case _:
            yield from _unpack_columns(files, names["qweight"], piece.arrangement, rows)


def _stored_zeros(
    files: TensorFiles, names: dict[str, str], arrangement: Arrangement, rows: _Rows
) -> torch.Tensor | None:
    """Return the zeros as they are held, [O, G], int16; None where none are stored."""
    bits, num_outputs = rows.scheme.bits, rows.codes.shape[0]
    match arrangement:
        case Arrangement.INT8_CODES if "weight_zero_point" in names:
            return files.read_all(names["weight_zero_point"]).to(torch.int16)
        case Arrangement.PACKED_CODES if "weight_zero_point" in names:
            words = files.read_all(names["weight_zero_point"]).T
            return held_zeros(unpack_words(words, bits, num_outputs).T, bits)
        case Arrangement.GPTQ_CODES | Arrangement.GPTQ_V2_CODES:
            zeros = unpack_words(files.read_all(names["qzeros"]), bits, num_outputs).T
            if arrangement == Arrangement.GPTQ_CODES:
                # Of a zero of 0 the writer stores -1, which has all bits set; it reads it back by the same wrap.
                zeros = (zeros + 1) & ((1 << bits) - 1)
            return held_zeros(zeros, bits)
        case Arrangement.AWQ_CODES:
            return held_zeros(unpack_awq_words(files.read_all(names["qzeros"]), num_outputs).T, bits)
    return None


def _copy_codes(files: TensorFiles, name: str, rows: _Rows) -> Iterator[int]:
    stored, flat = files.stored(name), rows.codes.view(-1)
    for start in range(0, flat.numel(), CHUNK_BYTES):
        target = flat[start : start + CHUNK_BYTES]
        part = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=torch.int8)
        files.read(stored, start, part)
        if part is not target:
            target.copy_(part)
        yield part.numel()


def _unpack_rows(files: TensorFiles, name: str, rows: _Rows) -> Iterator[int]:
    stored = files.stored(name)
    num_outputs, num_words = stored.shape
    step = min(num_outputs, max(1, CHUNK_BYTES // (4 * num_words)))
    staging = torch.empty(step, num_words, dtype=torch.int32)
    for start in range(0, num_outputs, step):
        words = staging[: min(step, num_outputs - start)]
        files.read(stored, start * num_words * 4, words)
        rows.codes[start : start + words.shape[0]].copy_(held_codes(words, rows.scheme, rows.num_inputs))
        yield words.shape[0] * rows.num_inputs


def _unpack_columns(files: TensorFiles, name: str, arrangement: Arrangement, rows: _Rows) -> Iterator[int]:
    words = files.read_all(name)
    num_outputs = rows.codes.shape[0]
    for start in range(0, num_outputs, _OUTPUTS_AT_ONCE):
        end = min(start + _OUTPUTS_AT_ONCE, num_outputs)
        if arrangement == Arrangement.AWQ_CODES:
            codes = held_awq_codes(words[:, start // 8 : -(-end // 8)], rows.scheme)[: end - start]
        else:
            codes = held_codes(words[:, start:end].T, rows.scheme, rows.num_inputs)
        rows.codes[start:end].copy_(codes)
        yield codes.shape[0] * rows.num_inputs


def _rows(held: QuantizedWeight, offset: int, num_outputs: int) -> _Rows:
    """Return the outputs of a held weight, or of a stack of them, that begin at element `offset`."""
    num_inputs = _num_inputs(held)
    part = slice(offset // num_inputs, offset // num_inputs + num_outputs)
    zeros = None if held.zeros is None else held.zeros.flatten(0, -2)[part]
    return _Rows(held.scheme, num_inputs, held.codes.flatten(0, -2)[part], held.scales.flatten(0, -2)[part], zeros)


def _num_inputs(held: QuantizedWeight) -> int:
    return int(held.codes.shape[-1]) * (2 if held.scheme.bits == 4 else 1)
