"""The blocks of one layer group: reference counts, free list, and the prefix index over computed blocks.

A block the group holds is in exactly one of three states:

    free     in no hand and not findable
    cached   in no hand, found by its digest until reused (least recently used first)
    owned    in at least one request's hand (reference count >= 1), findable or not

It knows nothing of requests or tokens; `manager.py` calls it.
"""

from collections.abc import Collection

from zif.contract import KVUsage
from zif.kv.slabs import SlabLender

MAX_REMEMBERED_EVICTIONS = 4096
"""Digests of evicted blocks kept to tell a miss by eviction from a miss of the unknown."""


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
        self._used_in_slab: dict[int, int] = {}
        self._idle_slabs: dict[int, None] = {}
        self._free: dict[int, None] = {}
        self._cached: dict[int, None] = {}
        self._num_owned = 0
        self._block_of: dict[bytes, int] = {}
        self._evicted: dict[bytes, None] = {}
        self._name_of: dict[int, tuple[bytes, bytes]] = {}
        lender.register(self)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Return `num_blocks` unshared blocks in one hand, or None, nothing changed but what was evicted."""
        while len(self._free) < num_blocks:
            if not self._refill():
                return None
        return [self._take_free() for _ in range(num_blocks)]

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
            self._put_free(block)

    def find(self, digest: bytes, content: bytes) -> int | None:
        """Return the block with this content, or None. The bytes are compared: a digest alone proves nothing."""
        block = self._block_of.get(digest)
        if block is None or self._name_of[block][1] != content:
            return None
        return block

    def index(self, block: int, digest: bytes, content: bytes) -> bool:
        """Make an owned, computed block findable; the first block with a digest keeps it. True if this one has it."""
        if digest in self._block_of or block in self._name_of:
            return False
        self._block_of[digest] = block
        self._name_of[block] = (digest, content)
        return True

    def forget(self, digest: bytes) -> None:
        """Make a block unfindable, if one has this digest; unless it is owned, it becomes free."""
        block = self._block_of.get(digest)
        if block in self._cached:
            self._evict(block)
        elif block is not None:
            del self._block_of[digest], self._name_of[block]

    def was_evicted(self, digest: bytes) -> bool:
        """Say whether a block with this digest was dropped for its memory, as far back as is remembered."""
        return digest in self._evicted

    def forget_all(self) -> None:
        """Empty the index; cached blocks become free and slabs without owned blocks go back to the lender."""
        for block in tuple(self._cached):
            self._evict(block)
        self._block_of.clear()
        self._name_of.clear()
        for slab in tuple(self._idle_slabs):
            self._drop_slab(slab)
            self._lender.take_back(slab)

    def surrender_slab(self, *, evict: bool) -> int | None:
        """Give up a slab without owned blocks: an idle one, else, when `evict`, the least recently used one."""
        slab = next(iter(self._idle_slabs), None)
        if slab is None and evict:
            used = (self._slab_of[block] for block in self._cached)
            slab = next((slab for slab in used if not self._owned_in_slab[slab]), None)
        if slab is not None:
            self._drop_slab(slab)
        return slab

    @property
    def num_own_available(self) -> int:
        """Count the blocks that `allocate` could return without another slab."""
        return len(self._free) + len(self._cached)

    @property
    def slabs(self) -> Collection[int]:
        """The slabs that the group holds."""
        return self._slabs.keys()

    def num_spare_slabs(self, num_spare_blocks: int) -> int:
        """Count the slabs that could surely be surrendered at the cost of `num_spare_blocks` unowned blocks."""
        arena = self._lender.arena
        max_slab_blocks = arena.slab_bytes // arena.groups[self._group].layout.block_bytes
        unowned = sum(not owned for owned in self._owned_in_slab.values())
        return min(unowned, num_spare_blocks // max_slab_blocks)

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
        states = (set(self._free), set(self._cached), owned)
        assert set(held) == set().union(*states), f"group {self._group}: blocks lost or foreign"
        assert len(held) == sum(map(len, states)), f"group {self._group}: a block is in two states"
        assert len(owned) == self._num_owned, f"group {self._group}: owned count drifted"
        for slab, blocks in self._slabs.items():
            num_free = sum(block in self._free for block in blocks)
            assert self._owned_in_slab[slab] == len(owned.intersection(blocks)), f"slab {slab}: owned count drifted"
            assert self._used_in_slab[slab] == len(blocks) - num_free, f"slab {slab}: used count drifted"
            assert (slab in self._idle_slabs) == (num_free == len(blocks)), f"slab {slab}: wrongly idle or busy"
        assert 0 not in held, f"group {self._group}: the null block was lent"
        assert {b: d for d, b in self._block_of.items()} == {b: n[0] for b, n in self._name_of.items()}
        assert not set(self._free) & set(self._name_of), f"group {self._group}: a free block is findable"

    def _take_free(self) -> int:
        block, _ = self._free.popitem()
        slab = self._slab_of[block]
        self._used_in_slab[slab] += 1
        self._idle_slabs.pop(slab, None)
        self._take(block)
        return block

    def _put_free(self, block: int) -> None:
        slab = self._slab_of[block]
        self._free[block] = None
        self._used_in_slab[slab] -= 1
        if not self._used_in_slab[slab]:
            self._idle_slabs[slab] = None

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
            self._evict(next(iter(self._cached)), remember=True)
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
        self._owned_in_slab[slab] = self._used_in_slab[slab] = 0
        self._idle_slabs[slab] = None
        for block in reversed(blocks):
            self._slab_of[block] = slab
            self._free[block] = None

    def _drop_slab(self, slab: int) -> None:
        for block in self._slabs.pop(slab):
            if block in self._cached:
                self._evict(block, remember=True)
            del self._free[block]
        del self._owned_in_slab[slab], self._used_in_slab[slab], self._idle_slabs[slab]

    def _evict(self, block: int, remember: bool = False) -> None:
        del self._cached[block]
        digest, _ = self._name_of.pop(block)
        del self._block_of[digest]
        if remember:
            self._evicted[digest] = None
            if len(self._evicted) > MAX_REMEMBERED_EVICTIONS:
                del self._evicted[next(iter(self._evicted))]
        self._put_free(block)

    def _num_lendable(self) -> int:
        return self._lender.num_free * self._lender.arena.min_slab_blocks(self._group)
