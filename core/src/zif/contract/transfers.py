"""KV blocks on their way between a device and slower memory: what a step plan asks for, and where the bytes are kept.

The control plane decides which block goes where and names each copy by a *handle*, an integer of its own that is never
used twice. A runner moves bytes between its arena and a `KVStore`; the store keeps them in host memory, on disk or
remote, and never decides.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

BlockBytes = bytes | bytearray | memoryview
"""The bytes of one block, as its `KVLayout` orders them."""


@dataclass(frozen=True, slots=True)
class BlockSave:
    """Copy a block of the arena into the store's first tier.

    `name` identifies the content for good: the digest that the prefix index knows it by, or b"" for a copy that only
    its request will ever read (a swapped-out one), which need not survive the process.
    """

    group: int
    block_id: int
    handle: int
    name: bytes = b""


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Copy what is kept under `handle` into a block of the arena.

    A store that was never given `handle` looks for `name` in its remote tier, whatever engine put it there.
    """

    group: int
    block_id: int
    handle: int
    name: bytes = b""


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """What an earlier process left in a durable tier, oldest first; `handle` is the store's choice."""

    handle: int
    group: int
    name: bytes
    num_bytes: int


@dataclass(slots=True)
class Transfers:
    """Copies that precede a step, in the order of `carry_out`.

    `drops` are handles that are never asked for again, `demotions` handles that move one tier down. What is saved or
    loaded here is neither dropped nor demoted here, so room is made before it is taken and no tier exceeds its bounds.
    After a step that raised, its drops and demotions come again, before those of the next plan (`Scheduler.abandon`).
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
    A handle that it does not know, because it lost it, or because a plan is carried out again, is no error. A copy that
    is demoted once more than was meant may be lost.
    """

    def kept(self) -> Sequence[KeptBlock]:
        """Return what an earlier process left. Called once, before anything else."""
        return ()

    @abstractmethod
    def save(self, save: BlockSave, data: BlockBytes) -> None:
        """Keep a copy of `data`, the bytes of the block to save; `data` may change after the call."""

    @abstractmethod
    def load(self, load: BlockLoad) -> BlockBytes | None:
        """Return what was saved under the handle, or None when it is lost."""

    @abstractmethod
    def demote(self, handle: int) -> None:
        """Move what is kept under `handle` one tier down."""

    @abstractmethod
    def drop(self, handle: int) -> None:
        """Forget `handle` and what is kept under it; a remote tier's copy is not the store's to forget."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and files back. Idempotent."""


class RemoteTier(ABC):
    """KV blocks kept elsewhere, shared by engines: the interface that a deployment implements.

    Names and data are opaque. Each call returns within `timeout_s` or raises `OSError`, of which `TimeoutError` is one;
    it is then left alone for a while, and what it has counts as not found. Calls come from one thread.
    """

    @abstractmethod
    def contains(self, names: Sequence[bytes], timeout_s: float) -> Sequence[bool]:
        """Say for each name whether it is kept."""

    @abstractmethod
    def put(self, name: bytes, data: bytes, timeout_s: float) -> None:
        """Keep `data`; the same name always comes with the same content."""

    @abstractmethod
    def get(self, name: bytes, timeout_s: float) -> bytes | None:
        """Return what is kept under `name`, or None."""


class BlockMemory(Protocol):
    """A runner's arena, block by block."""

    def read_block(self, group: int, block_id: int) -> BlockBytes:
        """Return the bytes of a block; they may be a view that is valid until the next write."""
        ...

    def write_block(self, group: int, block_id: int, data: BlockBytes) -> None:
        """Overwrite a block."""
        ...


def carry_out(transfers: Transfers, store: KVStore, memory: BlockMemory) -> list[int]:
    """Make the copies of a plan: drops, demotions, saves, then loads. Returns the handles that were lost.

    A block whose copy is lost keeps what is in it, and nobody finds what is computed on it.
    """
    for handle in transfers.drops:
        store.drop(handle)
    for handle in transfers.demotions:
        store.demote(handle)
    for save in transfers.saves:
        store.save(save, memory.read_block(save.group, save.block_id))
    lost = []
    for load in transfers.loads:
        data = store.load(load)
        if data is None:
            lost.append(load.handle)
        else:
            memory.write_block(load.group, load.block_id, data)
    return lost
