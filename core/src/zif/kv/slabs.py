"""The slabs of the arena: which group holds which one, and which of a group's slabs could be given up.

`SlabLender` is one for all groups; a pool has its own `HeldSlabs`.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable
from itertools import compress, count
from typing import Protocol

from zif.contract import KVArena


class SlabHolder(Protocol):
    """A pool that may be asked to give a slab back."""

    def surrender_slab(self, *, evict: bool) -> int | None:
        """Give up a slab without owned blocks: an idle one, else, when `evict`, the first one to be evicted."""
        ...


class SlabLender:
    """Lend slabs 1 to num_slabs - 1 to the pools of the layer groups. Slab 0, the null slab, is never lent."""

    def __init__(self, arena: KVArena) -> None:
        self.arena = arena
        self._returned = array("i")
        self._first_unused = 1
        self._holders: list[SlabHolder] = []

    @property
    def num_free(self) -> int:
        """Count the slabs that no group holds."""
        return len(self._returned) + self.arena.num_slabs - self._first_unused

    def register(self, holder: SlabHolder) -> None:
        """Make a pool known; its place in the order is its group's index."""
        self._holders.append(holder)

    def lend(self) -> int | None:
        """Return a free slab, or None."""
        if self._returned:
            return self._returned.pop()
        if self._first_unused == self.arena.num_slabs:
            return None
        self._first_unused += 1
        return self._first_unused - 1

    def take_back(self, slab: int) -> None:
        """Take back a slab that a pool no longer holds."""
        self._returned.append(slab)

    def lend_surrendered(self, borrower: SlabHolder, *, evict: bool) -> int | None:
        """Return a slab that another group can do without, or None."""
        for holder in self._holders:
            if holder is not borrower:
                slab = holder.surrender_slab(evict=evict)
                if slab is not None:
                    return slab
        return None

    def check_integrity(self, lent: list[int]) -> None:
        """Assert that every slab but the null slab is either free or in `lent`, once."""
        lent_once = sorted([*self._returned, *lent]) == list(range(1, self._first_unused))
        assert lent_once, "a slab is lost or lent twice"


class HeldSlabs(ABC):
    """The slabs that one group holds."""

    def __init__(self, arena: KVArena, group: int) -> None:
        self._arena = arena
        self._group = group
        self._is_held = bytearray(arena.num_slabs)

    def borrow(self, slab: int) -> range:
        """Hold a slab; return its blocks, all free."""
        self._is_held[slab] = True
        return self._arena.slab_blocks(self._group, slab)

    def give_up(self, slab: int) -> range:
        """Hold a slab no longer; return what were its blocks, all free."""
        self._is_held[slab] = False
        return self._arena.slab_blocks(self._group, slab)

    def held(self) -> list[int]:
        """Return the slabs that the group holds."""
        return [*compress(count(), self._is_held)]

    def blocks(self) -> list[range]:
        """Return the blocks of every slab that the group holds."""
        slab_bytes, block_bytes = self._arena.slab_bytes, self._arena.groups[self._group].layout.block_bytes
        return [
            range(-(-slab * slab_bytes // block_bytes), (slab + 1) * slab_bytes // block_bytes) for slab in self.held()
        ]

    @abstractmethod
    def slab_of(self, block: int) -> int:
        """Return the slab that a block lies in."""

    @abstractmethod
    def first_idle(self) -> int | None:
        """Return a slab all of whose blocks are free, or None."""

    @abstractmethod
    def is_owned_beside(self, block: int) -> bool:
        """Say whether another block in the slab of an unowned one is owned."""

    @abstractmethod
    def num_spare(self, num_spare_blocks: int) -> int:
        """Count the slabs that could surely be given up at the cost of `num_spare_blocks` unowned blocks."""

    @abstractmethod
    def check_integrity(self, free: Iterable[int], owned: Iterable[int]) -> None:
        """Assert that what was counted matches the blocks in each state."""


class OneBlockSlabs(HeldSlabs):
    """Slabs as large as a block: slab and block have one number, and nothing needs counting.

    `first_free` returns a free block, or None.
    """

    def __init__(self, arena: KVArena, group: int, first_free: Callable[[], int | None]) -> None:
        super().__init__(arena, group)
        self._first_free = first_free

    def borrow(self, slab: int) -> range:
        self._is_held[slab] = True
        return range(slab, slab + 1)

    def slab_of(self, block: int) -> int:
        return block

    def first_idle(self) -> int | None:
        return self._first_free()

    def is_owned_beside(self, block: int) -> bool:
        return False

    def num_spare(self, num_spare_blocks: int) -> int:
        return num_spare_blocks

    def check_integrity(self, free: Iterable[int], owned: Iterable[int]) -> None:
        pass


class ManyBlockSlabs(HeldSlabs):
    """Slabs that offer more than one block, or of another size than it: counts per slab say which are idle."""

    def __init__(self, arena: KVArena, group: int) -> None:
        super().__init__(arena, group)
        self._slab_bytes = arena.slab_bytes
        self._block_bytes = arena.groups[group].layout.block_bytes
        self._num_owned = array("i", bytes(4 * arena.num_slabs))
        self._num_used = array("i", bytes(4 * arena.num_slabs))
        self._idle: dict[int, None] = {}
        self._num_unowned = 0

    def borrow(self, slab: int) -> range:
        self._idle[slab] = None
        self._num_unowned += 1
        return super().borrow(slab)

    def give_up(self, slab: int) -> range:
        del self._idle[slab]
        self._num_unowned -= 1
        return super().give_up(slab)

    def slab_of(self, block: int) -> int:
        return block * self._block_bytes // self._slab_bytes

    def count_owned(self, block: int, change: int) -> None:
        """Hear that a block became owned (1) or unowned (-1)."""
        slab = block * self._block_bytes // self._slab_bytes
        count = self._num_owned[slab] = self._num_owned[slab] + change
        if count == (change > 0):
            self._num_unowned -= change

    def count_used(self, block: int, change: int) -> None:
        """Hear that a block stopped being free (1) or became free (-1)."""
        slab = block * self._block_bytes // self._slab_bytes
        count = self._num_used[slab] = self._num_used[slab] + change
        if not count:
            self._idle[slab] = None
        elif count == change:
            del self._idle[slab]

    def first_idle(self) -> int | None:
        return next(iter(self._idle), None)

    def is_owned_beside(self, block: int) -> bool:
        return self._num_owned[self.slab_of(block)] > 0

    def num_spare(self, num_spare_blocks: int) -> int:
        return min(self._num_unowned, num_spare_blocks // (self._slab_bytes // self._block_bytes))

    def check_integrity(self, free: Iterable[int], owned: Iterable[int]) -> None:
        num_free, num_owned = self._count(free), self._count(owned)
        assert self._num_owned == num_owned, "owned counts of slabs drifted"
        slabs = self.held()
        num_used = [len(blocks) - num_free[slab] for slab, blocks in zip(slabs, self.blocks(), strict=True)]
        assert [self._num_used[slab] for slab in slabs] == num_used, "used counts of slabs drifted"
        idle = {slab for slab, used in zip(slabs, num_used, strict=True) if not used}
        assert self._idle.keys() == idle, f"slabs {self._idle.keys() ^ idle} are wrongly idle or busy"
        num_unowned = [num_owned[slab] for slab in slabs].count(0)
        assert num_unowned == self._num_unowned, "the number of slabs without owned blocks drifted"

    def _count(self, blocks: Iterable[int]) -> "array[int]":
        """Count blocks by slab."""
        counts, slab_bytes, block_bytes = array("i", bytes(4 * len(self._is_held))), self._slab_bytes, self._block_bytes
        for block in blocks:
            counts[block * block_bytes // slab_bytes] += 1
        return counts
