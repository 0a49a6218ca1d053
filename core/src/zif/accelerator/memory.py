"""A device's memory through torch: a pool for each tag, out of memory that can be recovered from, sleep and wake.

The ledger is the contract's. A tag has a pool of its own where this build of torch has pools for the device, so that
what short-lived buffers leave behind does not cut up what holds the weights and the KV cache, and a tag's memory goes
back to the device as a whole.
"""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from zif.accelerator.faults import device_faults
from zif.contract import Allocator, Buffer
from zif.errors import OutOfMemoryError, PlatformError

_TORCH_ALIGNMENT = 64
"""Every allocator of torch aligns at least so far (c10/core/alignment.h); those of devices align further."""

_MAX_BYTES = 1 << 62
"""Beyond it torch complains about the number, not about the memory."""

_SAYS_FULL = ("out of memory", "can't allocate memory", "not enough memory", "overflow")


@dataclass(frozen=True, slots=True)
class _Sleeper:
    """What brings a buffer back: the size of its storage, and its bytes, None where they were given up."""

    storage_bytes: int
    kept: torch.Tensor | None


class AcceleratorAllocator(Allocator[torch.Tensor]):
    """Lend torch's memory of one device. Calls come from one thread."""

    def __init__(self, limit_bytes: int, array_device: str) -> None:
        super().__init__(limit_bytes)
        self._array_device = array_device
        self._pools = _Pools(array_device)
        self._tag = ""
        self._alignments: dict[int, int] = {}
        self._sleepers: dict[int, _Sleeper] = {}
        self._asleep = False

    def allocate(self, num_bytes: int, tag: str, alignment: int = 64) -> Buffer[torch.Tensor]:
        if self._asleep:
            raise PlatformError(f"cannot allocate {num_bytes} bytes for {tag!r}: the allocator sleeps; call wake first")
        self._tag = tag
        buffer = super().allocate(num_bytes, tag, alignment)
        self._alignments[buffer.buffer_id] = alignment
        return buffer

    def free_tag(self, tag: str) -> None:
        super().free_tag(tag)
        self._pools.leave(tag)

    def sleep(self, tags_kept_on_host: Collection[str] = ()) -> None:
        """Give the memory of all buffers back to the device; idempotent.

        The bytes of buffers under these tags move to host memory, pinned where that is possible; those of others are
        given up. Until `wake`, no tensor over the memory may be used, not even read: it has no address, and what was
        captured with its address is void for ever. The ledger still counts the buffers, which stay on loan.
        Raises `OutOfMemoryError`, with nothing changed, when host memory cannot hold the bytes.
        """
        if self._asleep:
            return
        sleepers = {}
        with device_faults(self._array_device):
            for buffer in self._live.values():
                kept = self._to_host(buffer) if buffer.tag in tags_kept_on_host else None
                sleepers[buffer.buffer_id] = _Sleeper(buffer.array.untyped_storage().nbytes(), kept)
            for buffer in self._live.values():
                buffer.array.untyped_storage().resize_(0)
            self._sleepers, self._asleep = sleepers, True
            for tag in {buffer.tag for buffer in self._live.values()}:
                self._pools.leave(tag)

    def wake(self) -> None:
        """Give every buffer memory again, at a new address: kept bytes as they were, others zero. Idempotent.

        Raises `OutOfMemoryError` when the device cannot hold all of them; those that are still asleep stay so, and
        `wake` may be called again.
        """
        for buffer_id, sleeper in list(self._sleepers.items()):
            self._wake_buffer(self._live[buffer_id], sleeper)
            del self._sleepers[buffer_id]
        self._asleep = False

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        if num_bytes > _MAX_BYTES:
            raise OutOfMemoryError(f"device {self._array_device!r} cannot hold {num_bytes} bytes more: no device can")
        memory = self._zeros(num_bytes + (alignment if alignment > _TORCH_ALIGNMENT else 0))
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Forget the buffer: torch takes the memory back with the last tensor that views it."""
        self._alignments.pop(buffer.buffer_id, None)
        self._sleepers.pop(buffer.buffer_id, None)

    def _zeros(self, num_bytes: int) -> torch.Tensor:
        """Return memory from the tag's pool; when there is none left, ask torch to give back what it hoards first."""
        try:
            return self._zeros_once(num_bytes)
        except OutOfMemoryError:
            self._pools.empty_caches()
        return self._zeros_once(num_bytes)

    def _zeros_once(self, num_bytes: int) -> torch.Tensor:
        # No inference tensors, whoever asks: they could not be filled again at `wake` outside of that mode.
        with torch.inference_mode(False), self._out_of_memory(num_bytes), self._pools.within(self._tag):
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._array_device)

    def _to_host(self, buffer: Buffer[torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode(False):
            return _host_memory(buffer.num_bytes, torch.device(self._array_device).type != "cpu").copy_(buffer.array)

    def _wake_buffer(self, buffer: Buffer[torch.Tensor], sleeper: _Sleeper) -> None:
        storage = buffer.array.untyped_storage()
        try:
            self._resize(storage, sleeper.storage_bytes, buffer.tag)
        except OutOfMemoryError:
            self._pools.empty_caches()
            self._resize(storage, sleeper.storage_bytes, buffer.tag)
        alignment = self._alignments[buffer.buffer_id]
        if buffer.array.data_ptr() % alignment:
            # The offset of the views in their storage is fixed, so a new address cannot be corrected.
            storage.resize_(0)
            raise PlatformError(
                f"the memory of {buffer.tag!r} cannot wake at a multiple of {alignment} bytes: close the device and "
                "open it again"
            )
        with torch.inference_mode(False), device_faults(self._array_device):
            if sleeper.kept is None:
                buffer.array.zero_()
            else:
                buffer.array.copy_(sleeper.kept)

    def _resize(self, storage: torch.UntypedStorage, num_bytes: int, tag: str) -> None:
        with self._out_of_memory(num_bytes), self._pools.within(tag):
            storage.resize_(num_bytes)

    @contextlib.contextmanager
    def _out_of_memory(self, num_bytes: int) -> Iterator[None]:
        """Turn torch's out of memory into the contract's, and errors that mean a lost device into theirs."""
        try:
            with device_faults(self._array_device):
                yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            first_line = next(iter(str(error).splitlines()), "")
            raise OutOfMemoryError(
                f"device {self._array_device!r} cannot hold {num_bytes} bytes more ({first_line}); free memory"
            ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether torch reports that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _SAYS_FULL)


def empty_caches(array_device: str) -> None:
    """Ask torch to give back to the device what it holds and nobody uses. Does nothing where torch hoards nothing."""
    empty = getattr(torch.get_device_module(array_device), "empty_cache", None)
    if empty is not None:
        empty()


class _Pools:
    """Torch's memory pools of one device, by tag; no pools where this build of torch has none for the device.

    A pool keeps memory from the device as long as it exists, so a tag without buffers has none.
    """

    def __init__(self, array_device: str) -> None:
        self._array_device = array_device
        module = torch.get_device_module(array_device)
        self._make = getattr(module, "MemPool", None)
        self._use = getattr(module, "use_mem_pool", None)
        self._by_tag: dict[str, Any] = {}

    def within(self, tag: str) -> Any:
        """Return a context in which this thread's memory of the device comes from the tag's pool."""
        if self._make is None or self._use is None:
            return contextlib.nullcontext()
        if tag not in self._by_tag:
            self._by_tag[tag] = self._make()
        return self._use(self._by_tag[tag], self._array_device)

    def leave(self, tag: str) -> None:
        """Give a tag's pool up: what no tensor uses goes back to the device now, the rest when it is emptied later."""
        self._by_tag.pop(tag, None)
        self.empty_caches()

    def empty_caches(self) -> None:
        """Give back what torch holds and nobody uses."""
        empty_caches(self._array_device)


def _host_memory(num_bytes: int, pinned: bool) -> torch.Tensor:
    """Return host memory, pinned if asked for and possible: pinned memory is copied at the full speed of the bus."""
    if pinned:
        with contextlib.suppress(RuntimeError):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    try:
        return torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise OutOfMemoryError(
            f"host memory cannot keep {num_bytes} bytes ({error}); keep fewer tags, or free memory"
        ) from error
