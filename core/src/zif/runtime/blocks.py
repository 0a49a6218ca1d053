"""The arena of the torch runner, block by block: the bytes that go to slower memory and come back."""

import torch

from zif.contract import BlockBytes, KVArena


class ArenaBlocks:
    """Implements `BlockMemory` over the arena's bytes. memory: [arena.num_bytes], uint8, on any device."""

    def __init__(self, arena: KVArena, memory: torch.Tensor) -> None:
        self._block_bytes = [group.layout.block_bytes for group in arena.groups]
        self._memory = memory

    def read_block(self, group: int, block_id: int) -> BlockBytes:
        """Return a copy of a block's bytes; waits for what is under way on the device."""
        return self._block(group, block_id).cpu().numpy().tobytes()

    def write_block(self, group: int, block_id: int, data: BlockBytes) -> None:
        """Overwrite a block, before whatever is started on the device afterwards."""
        # A copy, because torch wants memory that may be written.
        self._block(group, block_id).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _block(self, group: int, block_id: int) -> torch.Tensor:
        num_bytes = self._block_bytes[group]
        return self._memory[block_id * num_bytes : (block_id + 1) * num_bytes]
