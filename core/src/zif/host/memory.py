"""Host memory for the device: anonymous mappings seen as torch tensors. The ledger is the contract's."""

import mmap

import torch

from zif.contract import Allocator, Buffer
from zif.errors import OutOfMemoryError

_HUGE_PAGE_BYTES = 2 << 20

# Shared mappings, the default, get huge pages only where the system gives them to shared memory, which few do.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class HostAllocator(Allocator[torch.Tensor]):
    """Lend anonymous mappings, each of its own, so that freed memory goes back to the system at once.

    A tensor keeps its mapping alive: memory is unmapped when the last tensor that views it is gone, never before.
    """

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        # The kernel aligns mappings to pages; what a larger alignment skips is mapped but never touched.
        slack = alignment if alignment > mmap.PAGESIZE else 0
        try:
            mapping = mmap.mmap(-1, num_bytes + slack, **_PRIVATE)
        except (OSError, OverflowError, ValueError) as error:
            raise OutOfMemoryError(f"the system cannot map {num_bytes} bytes: {error}; free memory") from error
        _ask_for_huge_pages(mapping, num_bytes)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Do nothing: the ledger has dropped its reference, and the mapping goes with the last one."""


def _ask_for_huge_pages(mapping: mmap.mmap, num_bytes: int) -> None:
    """Advise huge pages where the system knows them: fewer TLB misses when attention walks scattered blocks."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < _HUGE_PAGE_BYTES:
        return
    try:
        mapping.madvise(advice)
    except OSError:
        return  # A kernel built without them refuses the advice; the mapping is good all the same.
