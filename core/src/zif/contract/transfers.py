"""KV blocks on their way between a device and slower memory: what a step plan asks for, and where the bytes are kept.

The control plane decides which block goes where and names each copy by a *handle*, an integer of its own that is never
used twice. A runner moves bytes between its arena and a `KVStore`; the store keeps them in host memory, on disk or
remote, and never decides.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

BlockBytes = bytes | bytearray | memoryview
"""The bytes of one block, as its `KVLayout` orders them."""


@dataclass(frozen=True, slots=True)
class BlockSave:
    """Copy a block of the arena into the store.

    `name` identifies the content for good: the digest that the prefix index knows it by, or b"" for a copy that only
    its request will ever read (a swapped-out one), which need not survive the process.
    """

    group: int
    block_id: int
    handle: int
    name: bytes = b""


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Copy what is kept under `handle` into a block of the arena."""

    group: int
    block_id: int
    handle: int


@dataclass(slots=True)
class Transfers:
    """Copies that precede a step, in this order: all `saves`, then `loads`; then `demotions` and `drops`.

    `demotions` are handles that move one tier down, `drops` handles that are never asked for again.
    """

    saves: list[BlockSave] = field(default_factory=list)
    loads: list[BlockLoad] = field(default_factory=list)
    demotions: list[int] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.saves or self.loads or self.demotions or self.drops)


class KVStore(ABC):
    """Keep copies of blocks by handle. One per worker; called from the thread that submits steps.

    A store may fail to keep anything: a full disk, a checksum that does not fit, a remote that is gone. It then says so
    by `load` returning None, and the tokens are computed again. It never returns bytes that differ from those saved.
    """

    @abstractmethod
    def save(self, handle: int, group: int, name: bytes, data: BlockBytes) -> None:
        """Keep a copy of `data`, the bytes of one block of `group`."""

    @abstractmethod
    def load(self, handle: int) -> BlockBytes | None:
        """Return what was saved under `handle`, or None when it is lost."""

    @abstractmethod
    def demote(self, handle: int) -> None:
        """Move what is kept under `handle` one tier down."""

    @abstractmethod
    def drop(self, handle: int) -> None:
        """Forget `handle`. What has a name and a durable place may stay there for other processes."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and files back. Idempotent."""
