"""The blocks of one layer group: reference counts, free list, and the prefix index over computed blocks.

A block the group holds is in exactly one of three states:

    free     in no hand and not findable
    cached   in no hand, found by its digest until reused (least recently used first)
    owned    in at least one request's hand (reference count >= 1), findable or not

It knows nothing of requests or tokens; `manager.py` calls it.
"""

from zif.contract import KVUsage
from zif.kv.slabs import SlabLender


class BlockPool:
    """Hand out blocks of one group by id. Ids follow the arena's cells, see `zif.contract.KVArena`."""

    def __init__(self, lender: SlabLender, group: int) -> None:
        self._lender = lender
        self._group = group
        num_cells = lender.arena.num_cells(group)
        self._references = [0] * num_cells
        self._slab_of = [0] * num_cells
        self._slabs: dict[int, range] = {}
        self._owned_in_slab: dict[int, int] = {}
        self._free: list[int] = []
        self._cached: dict[int, None] = {}
        self._num_owned = 0
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, tuple[bytes, bytes]] = {}
        lender.register(self)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Return `num_blocks` unshared blocks in one hand, or None, nothing changed but what was evicted."""
        while len(self._free) < num_blocks:
            if not self._refill():
                return None
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._take(block)
        return taken

    def share(self, block: int) -> None:
        """Put one more hand on a cached or owned block."""
        if self._references[block]:
            self._references[block] += 1
        else:
            del self._cached[block]
            self._take(block)

    def release(self, block: int) -> None:
        """Take one hand off an owned block."""
        count = self._references[block] - 1
        assert count >= 0, f"block {block} of group {self._group} is released more often than it is held"
        self._references[block] = count
        if count:
            return
        self._num_owned -= 1
        self._owned_in_slab[self._slab_of[block]] -= 1
        if block in self._name_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def find(self, digest: bytes, content: bytes) -> int | None:
        """Return the block with this content, or None. The bytes are compared: a digest alone proves nothing."""
        block = self._block_of.get(digest)
        if block is None or self._name_of[block][1] != content:
            return None
        return block

    def index(self, block: int, digest: bytes, content: bytes) -> None:
        """Make an owned, computed block findable; the first block with a digest keeps it."""
        if digest not in self._block_of and block not in self._name_of:
            self._block_of[digest] = block
            self._name_of[block] = (digest, content)

    def forget_all(self) -> None:
        """Empty the index; cached blocks become free."""
        self._block_of.clear()
        self._name_of.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def surrender_slab(self, *, evict: bool) -> int | None:
        """Give up a slab without owned blocks, dropping cached blocks only when `evict`; None if there is none."""
        unowned = [slab for slab, owned in self._owned_in_slab.items() if not owned]
        if not unowned:
            return None
        slab = min(unowned, key=self._num_cached_in)
        if self._num_cached_in(slab) and not evict:
            return None
        self._return_slab(slab)
        return slab

    @property
    def num_own_available(self) -> int:
        """Count the blocks that `allocate` could return without another slab."""
        return len(self._free) + len(self._cached)

    def num_unowned_slabs(self) -> int:
        """Count the slabs that could be surrendered."""
        return sum(not owned for owned in self._owned_in_slab.values())

    def usage(self) -> KVUsage:
        """Count the group's blocks by state."""
        return KVUsage(len(self._free), len(self._cached), self._num_owned, self._num_lendable())

    def references(self) -> dict[int, int]:
        """Return the reference counts above zero, for integrity checks."""
        return {block: count for block, count in enumerate(self._references) if count}

    def check_integrity(self) -> None:
        """Assert that every block held is in exactly one state and that the index is consistent."""
        held = [block for blocks in self._slabs.values() for block in blocks]
        owned = set(self.references())
        assert len(held) == len(set(held)), f"group {self._group}: slabs overlap"
        assert len(self._free) == len(set(self._free)), f"group {self._group}: a block is free twice"
        states = (set(self._free), set(self._cached), owned)
        assert set(held) == set().union(*states), f"group {self._group}: blocks lost or foreign"
        assert len(held) == sum(map(len, states)), f"group {self._group}: a block is in two states"
        assert len(owned) == self._num_owned, f"group {self._group}: owned count drifted"
        assert 0 not in held, f"group {self._group}: the null block was lent"
        assert {b: d for d, b in self._block_of.items()} == {b: n[0] for b, n in self._name_of.items()}
        assert not set(self._free) & set(self._name_of), f"group {self._group}: a free block is findable"

    def _take(self, block: int) -> None:
        self._references[block] = 1
        self._num_owned += 1
        self._owned_in_slab[self._slab_of[block]] += 1

    def _refill(self) -> bool:
        """Make at least one more block free, at the least loss: idle memory first, cached prefixes last."""
        slab = self._lender.lend()
        if slab is None:
            slab = self._lender.lend_surrendered(self, evict=False)
        if slab is None and self._cached:
            self._evict(next(iter(self._cached)))
            return True
        if slab is None:
            slab = self._lender.lend_surrendered(self, evict=True)
        if slab is None:
            return False
        self._borrow(slab)
        return True

    def _borrow(self, slab: int) -> None:
        blocks = self._lender.arena.slab_blocks(self._group, slab)
        self._slabs[slab] = blocks
        self._owned_in_slab[slab] = 0
        for block in blocks:
            self._slab_of[block] = slab
        self._free.extend(reversed(blocks))

    def _return_slab(self, slab: int) -> None:
        blocks = self._slabs.pop(slab)
        del self._owned_in_slab[slab]
        for block in blocks:
            if block in self._cached:
                self._evict(block)
        self._free = [block for block in self._free if block not in blocks]

    def _evict(self, block: int) -> None:
        del self._cached[block]
        digest, _ = self._name_of.pop(block)
        del self._block_of[digest]
        self._free.append(block)

    def _num_cached_in(self, slab: int) -> int:
        return sum(block in self._cached for block in self._slabs[slab])

    def _num_lendable(self) -> int:
        return self._lender.num_free * self._lender.arena.min_slab_blocks(self._group)
