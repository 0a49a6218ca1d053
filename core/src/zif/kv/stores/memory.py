"""Copies of blocks in host memory, by handle. `tiered.py` is the only caller."""

from dataclasses import dataclass

from zif.contract import BlockBytes


@dataclass(frozen=True, slots=True)
class HeldBlock:
    """A copy with what it is a copy of; `name` is b"" for a private one."""

    group: int
    name: bytes
    data: bytes


class HostStore:
    """Hold at most `max_bytes`. Who saves has made room: more is a fault of the control plane."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._blocks: dict[int, HeldBlock] = {}

    def __contains__(self, handle: int) -> bool:
        return handle in self._blocks

    def put(self, handle: int, group: int, name: bytes, data: BlockBytes) -> None:
        """Keep a copy of `data`."""
        assert handle not in self._blocks, f"handle {handle} is saved twice"
        block = self._blocks[handle] = HeldBlock(group, name, bytes(data))
        self.num_bytes += len(block.data)
        assert self.num_bytes <= self.max_bytes, f"{self.num_bytes} bytes in a host tier of {self.max_bytes}"

    def get(self, handle: int) -> bytes | None:
        """Return what is held under `handle`, if anything."""
        block = self._blocks.pop(handle, None)
        if block is None:
            return None
        self._blocks[handle] = block
        return block.data

    def pop(self, handle: int) -> HeldBlock | None:
        """Give up what is held under `handle`, if anything."""
        block = self._blocks.pop(handle, None)
        if block is not None:
            self.num_bytes -= len(block.data)
        return block

    def pop_all(self) -> dict[int, HeldBlock]:
        """Give up everything, by handle, least recently used first."""
        blocks, self._blocks, self.num_bytes = self._blocks, {}, 0
        return blocks
