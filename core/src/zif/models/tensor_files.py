"""The files of one checkpoint, open for reading: ranges of tensors into memory, checked on the way.

Files are never mapped, so their pages never count as this process's memory. Used by `zif.models.weights` and what it
calls.
"""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, StoredTensor

CHUNK_BYTES = 4 << 20
"""Read at once: large enough for full speed, small enough that checking it finds it in cache."""

_WORDS = MappingProxyType(
    {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
)
"""Integers of the same size, to look at bits."""


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The open files of one checkpoint. Closed when its context ends."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._files: dict[Path, int] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def stored(self, name: str) -> StoredTensor:
        """Return what is known of a stored tensor."""
        return self._tensors[name]

    def read(self, stored: StoredTensor, start: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous and in host memory, with bytes of a stored tensor from `start` on.

        Raises `CheckpointError` when the file cannot be read or a number is not finite.
        """
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

    def read_all(self, name: str) -> torch.Tensor:
        """Read a whole stored tensor to host memory."""
        stored = self._tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored_dtype(stored))
        self.read(stored, 0, tensor)
        return tensor

    def read_entry(self, name: str, index: int) -> torch.Tensor:
        """Read entry `index` of a stored tensor's first axis to host memory."""
        stored = self._tensors[name]
        entry = torch.empty(stored.shape[1:], dtype=stored_dtype(stored))
        self.read(stored, index * entry.nbytes, entry)
        return entry

    def _descriptor(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]


def stored_dtype(stored: StoredTensor) -> torch.dtype:
    """Return torch's dtype of a stored tensor that the loader reads."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return dtype


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
