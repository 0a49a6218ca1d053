"""An allocator in host memory, for tests that need one and no platform."""

import torch

from zif.contract import Allocator, Buffer


class HostAllocator(Allocator[torch.Tensor]):
    """Lend zero-filled tensors."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        super().__init__(limit_bytes)

    def _allocate(self, num_bytes: int, alignment: int) -> torch.Tensor:
        memory = torch.zeros(num_bytes + alignment, dtype=torch.uint8)
        first = -memory.data_ptr() % alignment
        return memory[first : first + num_bytes]

    def _free(self, buffer: Buffer[torch.Tensor]) -> None:
        del buffer
