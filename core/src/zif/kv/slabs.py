"""The lender of slabs: which group holds which slab of the arena."""

from typing import Protocol

from zif.contract import KVArena


class SlabHolder(Protocol):
    """A pool that may be asked to give a slab back."""

    def surrender_slab(self, *, evict: bool) -> int | None:
        """Give up a slab without owned blocks: an idle one, else, when `evict`, the least recently used one."""
        ...


class SlabLender:
    """Lend slabs 1 to num_slabs - 1 to the pools of the layer groups. Slab 0, the null slab, is never lent."""

    def __init__(self, arena: KVArena) -> None:
        self.arena = arena
        self._free = list(range(arena.num_slabs - 1, 0, -1))
        self._holders: list[SlabHolder] = []

    @property
    def num_free(self) -> int:
        """Count the slabs that no group holds."""
        return len(self._free)

    def register(self, holder: SlabHolder) -> None:
        """Make a pool known; its place in the order is its group's index."""
        self._holders.append(holder)

    def lend(self) -> int | None:
        """Return a free slab, or None."""
        return self._free.pop() if self._free else None

    def take_back(self, slab: int) -> None:
        """Take back a slab that a pool no longer holds."""
        self._free.append(slab)

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
        assert sorted(self._free + lent) == list(range(1, self.arena.num_slabs)), "a slab is lost or lent twice"
