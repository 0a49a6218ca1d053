"""Device memory as XLA arrays. The ledger is the contract's."""

import math

import torch
import torch_xla

from zif.contract import Allocator, Buffer
from zif.errors import OutOfMemoryError


class XlaAllocator(Allocator[torch.Tensor]):
    """Lend arrays of bytes. XLA has no addresses to align, and places every array as its kernels like it."""

    def __init__(self, limit_bytes: int, array_device: str) -> None:
        super().__init__(limit_bytes)
        self._array_device = array_device
        self._only_counts = False

    def reserve(self, num_bytes: int, tag: str) -> None:
        """Count the bytes of an array that is made elsewhere, with the type and shape that programs want.

        Raises `OutOfMemoryError` as `allocate` does. `free_tag` ends it.
        """
        self._only_counts = True
        try:
            self.allocate(num_bytes, tag)
        finally:
            self._only_counts = False

    def zeros(self, tag: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """Make an array of zeros whose type XLA knows; bytes seen as another type would be copied by every program.

        Raises `OutOfMemoryError`.
        """
        self.reserve(math.prod(shape) * dtype.itemsize, tag)
        return self._zeros(dtype, *shape)

    def _zeros(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        try:
            array = torch.zeros(*shape, dtype=dtype, device=self._array_device)
            torch_xla._XLAC._xla_sync_multi([array], [], wait=True)  # made now: what is lazy cannot run out of memory
        except (RuntimeError, MemoryError) as error:
            num_bytes = math.prod(shape) * dtype.itemsize
            raise OutOfMemoryError(f"the device cannot hold {num_bytes} bytes more: {error}; free memory") from error
        return array

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        if self._only_counts:
            return torch.empty(0, dtype=torch.uint8)
        return self._zeros(torch.uint8, num_bytes)

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Do nothing: the ledger has dropped its reference, and the memory goes with the last one."""
