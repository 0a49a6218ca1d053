"""Fills held tensors of the model dtype from stored numbers, whatever their order, dtype and memory.

    file --read--> held tensor                      same dtype and order, host memory; by several threads
    file --read--> staging --copy--> held tensor    everything else, a few megabytes (or one expert) at a time

Called by `zif.models.weights`, and by `zif.models.quantization.loading` for what is rounded afterwards.
"""

from collections.abc import Iterator

import torch

from zif.errors import CheckpointError
from zif.models.checkpoint import StoredTensor
from zif.models.held import Arrangement, Piece
from zif.models.mxfp4 import dequantize
from zif.models.tensor_files import CHUNK_BYTES, TensorFiles, stored_dtype


def fill_numbers(files: TensorFiles, held: torch.Tensor, piece: Piece) -> Iterator[int]:
    """Put one piece in its place; yield the number of elements after each part. held: the whole held tensor.

    What is read straight to its place is there after `files.wait()`.
    """
    if piece.arrangement == Arrangement.AS_STORED:
        yield from _copy(files, held.view(-1), piece)
    else:
        for index in range(held.shape[0]):
            arrange_entry(files, held[index], piece, index)
            yield held[index].numel()


def arrange_entry(files: TensorFiles, held: torch.Tensor, piece: Piece, index: int) -> None:
    """Fill expert `index` of a tensor whose stored order differs. held: one expert's matrix or bias."""
    arrays = [files.read_entry(source.name, index) for source in piece.sources]
    match piece.arrangement:
        case Arrangement.TRANSPOSED:
            held.copy_(arrays[0].T)
        case Arrangement.INTERLEAVED:
            _copy_halves(held, arrays[0])
        case Arrangement.INTERLEAVED_TRANSPOSED:
            _copy_halves(held, arrays[0].T)
        case Arrangement.MXFP4:
            held.copy_(dequantize(arrays[0], arrays[1]))
        case Arrangement.MXFP4_INTERLEAVED:
            _copy_halves(held, dequantize(arrays[0], arrays[1]))
    check_range(files.stored(piece.sources[0].name), held, held.dtype)


def check_range(stored: StoredTensor, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise when finite stored values are none in the dtype that they are held in. Only narrower exponents can do that.

    values: some of them, in that dtype or as they are stored.
    """
    stored_range = torch.finfo(stored_dtype(stored)).max if stored.dtype != "uint8" else float("inf")
    if stored_range > torch.finfo(dtype).max and not _is_finite(values.to(dtype)):
        raise CheckpointError(
            f"tensor {stored.name!r} in {str(stored.file)!r} has values that {dtype} cannot hold "
            f"(or that are no numbers); use dtype='bfloat16' or 'float32', or download the file again"
        )


def _copy(files: TensorFiles, flat: torch.Tensor, piece: Piece) -> Iterator[int]:
    """Copy a stored tensor as it is. flat: the whole held tensor, one-dimensional."""
    stored = files.stored(piece.sources[0].name)
    dtype = stored_dtype(stored)
    direct = dtype == flat.dtype and flat.device.type == "cpu"
    step = CHUNK_BYTES // dtype.itemsize
    staging = None if direct else torch.empty(step, dtype=dtype)
    num_elements = stored.num_bytes // dtype.itemsize
    for start in range(0, num_elements, step):
        count = min(step, num_elements - start)
        target = flat[piece.offset + start : piece.offset + start + count]
        if staging is None:
            files.read_soon(stored, start * dtype.itemsize, target)
        else:
            part = staging[:count]
            files.read(stored, start * dtype.itemsize, part)
            target.copy_(part)
            check_range(stored, target, target.dtype)
        yield count


def _copy_halves(held: torch.Tensor, alternating: torch.Tensor) -> None:
    """Put entries 0, 2, 4, ... of the first axis before entries 1, 3, 5, ..."""
    half = held.shape[0] // 2
    held[:half].copy_(alternating[0::2])
    held[half:].copy_(alternating[1::2])


def _is_finite(values: torch.Tensor) -> bool:
    extremes = values.aminmax()
    return bool(torch.isfinite(torch.stack((extremes.min, extremes.max))).all())
