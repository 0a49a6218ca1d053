"""Weights from a checkpoint's files into the allocator's memory, and the decoder on top of them.

Ranges of the files are read straight to where they are held, or through a small staging buffer where the order, the
dtype or the memory differs; files are never mapped, so their pages never count as this process's memory:

    file --read--> held tensor                      same dtype and order, host memory
    file --read--> staging --copy--> held tensor    everything else, a few megabytes (or one expert) at a time

Called by the torch runner. Which tensors there are, `zif.models.layout` decides.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from zif.contract import Allocator, Buffer, ModelDescription, OpTable, Progress
from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from zif.models.checksums import verify_files
from zif.models.decoder import Decoder
from zif.models.families import decoder_spec
from zif.models.layout import EMBEDDING, LM_HEAD, Arrangement, HeldTensor, Layout, Piece, plan_layout
from zif.models.model import Model
from zif.models.mxfp4 import dequantize

WEIGHTS_TAG = "weights"

_CHUNK_BYTES = 4 << 20
"""Read at once: large enough for full speed, small enough that checking it finds it in cache."""

_WORDS = MappingProxyType(
    {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
)
"""Integers of the same size, to look at bits."""


Keep = Callable[[str, torch.Tensor], torch.Tensor]


def load_decoder(
    model: ModelDescription,
    ops: OpTable,
    allocator: Allocator[torch.Tensor],
    array_device: str,
    progress: Progress,
    keep: Keep | None = None,
) -> Model:
    """Read the weights of a native model to the device and return the decoder.

    Allocates under the tag "weights"; `progress` hears bytes held. With `keep` the memory is a way station: what it
    returns for a name and a tensor becomes the weight, on `array_device`, and the memory is freed. Raises
    `CheckpointError`, which names the file or the tensors, or `OutOfMemoryError`; either leaves nothing allocated.
    """
    spec = decoder_spec(model.architecture, model.config)
    checkpoint = open_checkpoint(model.path)
    layout = plan_layout(spec, checkpoint)
    verify_files({tensor.file for tensor in checkpoint.tensors.values()})
    dtype = getattr(torch, model.dtype)
    with _Loader(checkpoint, allocator, dtype, keep) as loader:
        weights = loader.load(layout, progress)
    return Decoder(spec, weights, ops, model.max_model_len, array_device)


class _Loader(AbstractContextManager["_Loader"]):
    """The open files of one checkpoint and the buffers filled so far, which an error gives back."""

    def __init__(
        self, checkpoint: Checkpoint, allocator: Allocator[torch.Tensor], dtype: torch.dtype, keep: Keep | None
    ) -> None:
        self._keep = keep
        self._checkpoint = checkpoint
        self._allocator = allocator
        self._dtype = dtype
        self._files: dict[Path, int] = {}
        self._buffers: list[Buffer[torch.Tensor]] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        if kind is not None:
            for buffer in self._buffers:
                self._allocator.free(buffer)

    def load(self, layout: Layout, progress: Progress) -> dict[str, torch.Tensor]:
        """Fill every tensor of `layout`."""
        if layout.repeats_embedding:
            self._check_repeated_embedding()
        total, done = layout.num_elements * self._dtype.itemsize, 0
        weights: dict[str, torch.Tensor] = {}
        for held in layout.tensors:
            tensor = self._allocate(held)
            for piece in held.pieces:
                for num_elements in self._fill(tensor, piece):
                    done += num_elements * self._dtype.itemsize
                    progress(done, total)
            weights[held.name] = tensor if self._keep is None else self._passed_on(held.name, tensor, self._keep)
        return weights

    def _passed_on(self, name: str, tensor: torch.Tensor, keep: Keep) -> torch.Tensor:
        """Return what is kept of the tensor that was allocated last, whose memory goes back."""
        kept = keep(name, tensor)
        self._allocator.free(self._buffers.pop())
        return kept

    def _allocate(self, held: HeldTensor) -> torch.Tensor:
        buffer = self._allocator.allocate(held.num_elements * self._dtype.itemsize, WEIGHTS_TAG)
        self._buffers.append(buffer)
        return buffer.array.view(self._dtype).view(held.shape)

    def _fill(self, held: torch.Tensor, piece: Piece) -> Iterator[int]:
        """Put one piece in its place; yield the number of elements after each part."""
        if piece.arrangement == Arrangement.AS_STORED:
            yield from self._copy(held.view(-1), piece)
        else:
            for index in range(held.shape[0]):
                self._arrange(held[index], piece, index)
                yield held[index].numel()

    def _copy(self, flat: torch.Tensor, piece: Piece) -> Iterator[int]:
        """Copy a stored tensor as it is. flat: the whole held tensor, one-dimensional."""
        stored = self._checkpoint.tensors[piece.sources[0].name]
        dtype: torch.dtype = getattr(torch, stored.dtype)
        direct = dtype == self._dtype and flat.device.type == "cpu"
        step = _CHUNK_BYTES // dtype.itemsize
        staging = None if direct else torch.empty(step, dtype=dtype)
        num_elements = stored.num_bytes // dtype.itemsize
        for start in range(0, num_elements, step):
            count = min(step, num_elements - start)
            target = flat[piece.offset + start : piece.offset + start + count]
            part = target if staging is None else staging[:count]
            self._read(stored, start * dtype.itemsize, part)
            if staging is not None:
                target.copy_(part)
                self._check_range(stored, target)
            yield count

    def _arrange(self, held: torch.Tensor, piece: Piece, index: int) -> None:
        """Fill expert `index` of a tensor whose stored order differs. held: one expert's matrix or bias."""
        arrays = [self._read_expert(self._checkpoint.tensors[source.name], index) for source in piece.sources]
        stored = self._checkpoint.tensors[piece.sources[0].name]
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
        self._check_range(stored, held)

    def _read_expert(self, stored: StoredTensor, index: int) -> torch.Tensor:
        """Read entry `index` of a stored tensor's first axis to host memory."""
        expert = torch.empty(stored.shape[1:], dtype=getattr(torch, stored.dtype))
        self._read(stored, index * expert.nbytes, expert)
        return expert

    def _read(self, stored: StoredTensor, start: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous and in host memory, with bytes of a stored tensor from `start` on; check them."""
        view = target.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor(stored.file), [view[done:]], stored.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {str(stored.file)!r}: {error}; check the disk") from error
            if not count:
                raise CheckpointError(f"{str(stored.file)!r} ends within tensor {stored.name!r}; download it again")
            done += count
        if target.dtype.is_floating_point:
            _check_finite(stored, target)

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]

    def _check_range(self, stored: StoredTensor, held: torch.Tensor) -> None:
        """Raise when finite stored values are none in the model dtype. Only narrower exponents can do that."""
        stored_range = torch.finfo(getattr(torch, stored.dtype)).max if stored.dtype != "uint8" else float("inf")
        if stored_range > torch.finfo(self._dtype).max and not _is_finite(held):
            raise CheckpointError(
                f"tensor {stored.name!r} in {str(stored.file)!r} has values that {self._dtype} cannot hold "
                f"(or that are no numbers); use dtype='bfloat16' or 'float32', or download the file again"
            )

    def _check_repeated_embedding(self) -> None:
        """Raise unless the output matrix, stored although it is tied, equals the embedding."""
        embedding, head = self._checkpoint.tensors[EMBEDDING], self._checkpoint.tensors[LM_HEAD]
        if (embedding.dtype, embedding.shape) == (head.dtype, head.shape) and self._same_bytes(embedding, head):
            return
        raise CheckpointError(
            f"config.json ties the output matrix to the embedding, but {LM_HEAD!r} is stored and differs from "
            f"{EMBEDDING!r}; set tie_word_embeddings to false if the stored one is meant"
        )

    def _same_bytes(self, first: StoredTensor, second: StoredTensor) -> bool:
        for start in range(0, first.num_bytes, _CHUNK_BYTES):
            parts = torch.empty(2, min(_CHUNK_BYTES, first.num_bytes - start), dtype=torch.uint8)
            self._read(first, start, parts[0])
            self._read(second, start, parts[1])
            if not torch.equal(parts[0], parts[1]):
                return False
        return True


def _copy_halves(held: torch.Tensor, alternating: torch.Tensor) -> None:
    """Put entries 0, 2, 4, ... of the first axis before entries 1, 3, 5, ..."""
    half = held.shape[0] // 2
    held[:half].copy_(alternating[0::2])
    held[half:].copy_(alternating[1::2])


def _check_finite(stored: StoredTensor, values: torch.Tensor) -> None:
    """Raise when a value just read is infinite or NaN. values: contiguous, host memory.

    As integers, non-finite values are the largest of each sign: seen signed, the positive ones, and seen unsigned, the
    negative ones. Two integer maxima are one fast pass without temporaries or threads, unlike `isfinite`.
    """
    words = values.view(-1).view(_WORDS[values.dtype]).numpy()
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(_WORDS[values.dtype]))
    negative_infinity = infinity + (1 << (8 * values.itemsize - 1))
    if words.max() >= infinity or words.view(f"u{values.itemsize}").max() >= negative_infinity:
        raise CheckpointError(
            f"tensor {stored.name!r} in {str(stored.file)!r} has values that are not finite: the file is corrupt; "
            "download it again"
        )


def _is_finite(values: torch.Tensor) -> bool:
    extremes = values.aminmax()
    return bool(torch.isfinite(torch.stack((extremes.min, extremes.max))).all())
