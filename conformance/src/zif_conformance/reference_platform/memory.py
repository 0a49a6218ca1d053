"""Device memory: torch buffers on the host. The ledger and the limit are the contract's."""

import torch

from zif.contract import Allocator, Buffer
from zif.errors import OutOfMemoryError
from zif_conformance.reference_platform.faults import FaultInjector


class TorchAllocator(Allocator[torch.Tensor]):
    """Lend torch buffers. Memory is given back when the last tensor that views it is gone."""

    def __init__(self, limit_bytes: int, faults: FaultInjector) -> None:
        super().__init__(limit_bytes)
        self._faults = faults

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        self._faults.allocation()
        try:
            memory = torch.zeros(num_bytes + alignment - 1, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:  # torch raises the first on a size that the system refuses
            raise OutOfMemoryError(f"the host has no {num_bytes} bytes: {error}; free memory") from error
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        """Do nothing: the ledger has dropped its reference, and the memory goes with the last one."""
