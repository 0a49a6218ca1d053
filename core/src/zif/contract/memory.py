"""Device memory: buffers by tag, against a limit, with a ledger that always tells the truth."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from zif.errors import OutOfMemoryError

BufferT = TypeVar("BufferT")


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Bytes held, by tag, and the most ever held at once."""

    limit_bytes: int
    by_tag: tuple[tuple[str, int], ...]
    peak_bytes: int

    @property
    def allocated_bytes(self) -> int:
        """Sum the bytes held now."""
        return sum(num_bytes for _, num_bytes in self.by_tag)


@dataclass(frozen=True, slots=True)
class Buffer(Generic[BufferT]):
    """Memory on loan. `array` is one-dimensional, uint8, `num_bytes` long, zero-filled when handed out."""

    buffer_id: int
    tag: str
    num_bytes: int
    array: BufferT


class Allocator(ABC, Generic[BufferT]):
    """Lend device memory. The public methods keep the ledger; a platform implements `_allocate` and `_free`."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._live: dict[int, Buffer[BufferT]] = {}
        self._allocated_bytes = 0
        self._peak_bytes = 0
        self._next_id = 0

    def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[BufferT]:
        """Lend `num_bytes` zero-filled bytes whose address is a multiple of `alignment` (a power of two).

        Raises `OutOfMemoryError`, with nothing allocated and the allocator usable, when the limit would be exceeded
        or the device has no more. Raises `ValueError` on a size below 1 or an alignment that is no power of two.
        """
        if num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes!r} must be at least 1")
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment={alignment!r} must be a power of two")
        if self._allocated_bytes + num_bytes > self._limit_bytes:
            raise OutOfMemoryError(
                f"cannot allocate {num_bytes} bytes for {tag!r}: {self._allocated_bytes} of the limit of "
                f"{self._limit_bytes} bytes are held; free memory or raise the limit"
            )
        buffer = Buffer(self._next_id, tag, num_bytes, self._allocate(num_bytes, alignment))
        self._next_id += 1
        self._live[buffer.buffer_id] = buffer
        self._allocated_bytes += num_bytes
        self._peak_bytes = max(self._peak_bytes, self._allocated_bytes)
        return buffer

    def free(self, buffer: Buffer[BufferT]) -> None:
        """Take a buffer back. Raises `ValueError` when it is not on loan (freed twice, or another allocator's)."""
        if self._live.get(buffer.buffer_id) is not buffer:
            raise ValueError(f"buffer {buffer.buffer_id} ({buffer.tag!r}) is not on loan from this allocator")
        del self._live[buffer.buffer_id]
        self._allocated_bytes -= buffer.num_bytes
        self._free(buffer)

    def free_tag(self, tag: str) -> None:
        """Take back every buffer lent under `tag`."""
        for buffer in [b for b in self._live.values() if b.tag == tag]:
            self.free(buffer)

    def stats(self) -> MemoryStats:
        """Return the ledger."""
        by_tag: dict[str, int] = {}
        for buffer in self._live.values():
            by_tag[buffer.tag] = by_tag.get(buffer.tag, 0) + buffer.num_bytes
        return MemoryStats(self._limit_bytes, tuple(sorted(by_tag.items())), self._peak_bytes)

    @abstractmethod
    def _allocate(self, num_bytes: int, alignment: int) -> BufferT:
        """Return a zero-filled uint8 array of `num_bytes`; raise `OutOfMemoryError` when the device has no more."""

    @abstractmethod
    def _free(self, buffer: Buffer[BufferT]) -> None:
        """Give the memory back to the device once nothing else refers to it."""
