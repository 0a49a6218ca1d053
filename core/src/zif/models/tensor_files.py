"""The files of one checkpoint, open for reading: ranges of tensors into memory, checked on the way.

Files are never mapped, so their pages never count as this process's memory. What goes straight to its place is read by
several threads: the time of one goes to copying pages and to making those that are written to. Used by
`zif.models.weights` and what it calls.
"""

import functools
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch

from zif.errors import CheckpointError
from zif.models.checkpoint import Checkpoint, StoredTensor

CHUNK_BYTES = 4 << 20
"""Asked for at once: large enough for full speed, small enough to be staged anywhere."""
_CHECKED_BYTES = 1 << 20
"""Read and checked at once: the check finds them in the cache of one core."""

_WORDS = MappingProxyType(
    {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
)
"""Integers of the same size, to look at bits."""

_MAX_READERS = 8
"""Threads that read: more do not make memory faster."""
_READS_PER_READER = 4
"""Reads that wait for a thread: enough that none is idle, and few, so that an error is heard soon."""


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The open files of one checkpoint. Closed when its context ends, which ends reads that still wait."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._num_readers = min(torch.get_num_threads(), _MAX_READERS)
        self._readers = ThreadPoolExecutor(self._num_readers, "zif-read")
        self._reads: deque[Future[None]] = deque()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._readers.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)

    def stored(self, name: str) -> StoredTensor:
        """Return what is known of a stored tensor."""
        return self._tensors[name]

    def read(self, stored: StoredTensor, start: int, target: torch.Tensor) -> None:
        """Fill `target`, contiguous and in host memory, with bytes of a stored tensor from `start` on.

        Raises `CheckpointError` when the file cannot be read or a number is not finite.
        """
        flat = target.view(-1)
        step = _CHECKED_BYTES // flat.itemsize
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            self._read_bytes(stored, start + first * flat.itemsize, part.view(torch.uint8).numpy().data)
            if part.dtype.is_floating_point:
                _check_finite(stored, part)

    def read_soon(self, stored: StoredTensor, start: int, target: torch.Tensor) -> None:
        """Have `target` filled as by `read`, beside other reads; it is not to be looked at before `wait`.

        Raises what an earlier read raised. With one thread of torch, reads at once.
        """
        if self._num_readers == 1:
            self.read(stored, start, target)
            return
        if len(self._reads) == _READS_PER_READER * self._num_readers:
            self._reads.popleft().result()
        self._reads.append(self._readers.submit(self.read, stored, start, target))

    def wait(self) -> None:
        """Return when all of `read_soon` is in its place; raise what the first read raised that went wrong."""
        while self._reads:
            self._reads.popleft().result()

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

    def _read_bytes(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor(stored.file), [view[done:]], stored.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {str(stored.file)!r}: {error}; check the disk") from error
            if not count:
                raise CheckpointError(f"{str(stored.file)!r} ends within tensor {stored.name!r}; download it again")
            done += count

    def _descriptor(self, file: Path) -> int:
        with self._opening:
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
    infinity, negative_infinity = _infinities(values.dtype)
    if words.max() >= infinity or words.view(f"u{values.itemsize}").max() >= negative_infinity:
        raise CheckpointError(
            f"tensor {stored.name!r} in {str(stored.file)!r} has values that are not finite: the file is corrupt; "
            "download it again"
        )


@functools.cache
def _infinities(dtype: torch.dtype) -> tuple[int, int]:
    """Return the bits of both infinities as integers without sign."""
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(_WORDS[dtype]))
    return infinity, infinity + (1 << (8 * dtype.itemsize - 1))
