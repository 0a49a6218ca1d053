"""The blocks of one layer group: reference counts, free list, prefix index and order of eviction.

A block the group holds is in exactly one of three states:

    free     in no hand and not findable
    cached   in no hand, found by its content until reused, in the order of `eviction.py`
    owned    in at least one request's hand (reference count >= 1), findable or not

It knows nothing of requests or tokens; `manager.py` calls it. Everything it notes per block lies in flat arrays.
"""

import time
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, compress, count

from zif.contract import KVUsage
from zif.kv.eviction import EvictionOrder
from zif.kv.hashing import digest_of
from zif.kv.index import PrefixIndex
from zif.kv.journal import GroupJournal
from zif.kv.lists import BlockLists
from zif.kv.retention import DEFAULT_KEEP, Keep
from zif.kv.slabs import HeldSlabs, ManyBlockSlabs, OneBlockSlabs, SlabLender

OnEvict = Callable[[int, bytes], None]
"""Hears that the block with this digest is about to be reused, while its content is still in the block."""


class BlockPool:
    """Hand out blocks of one group by id. Ids follow the arena's cells, see `zif.contract.KVArena`.

    `clock` gives the seconds that `Keep.expires_s` refers to. `on_evict` is called once for each cached block whose
    memory is about to be reused, not for forgotten ones. `quotas` are percentages of the group's cells, by tenant.
    `journal` hears of every block that becomes findable or unfindable.
    """

    def __init__(
        self,
        lender: SlabLender,
        group: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_evict: OnEvict | None = None,
        quotas: Mapping[str, int] | None = None,
        journal: GroupJournal | None = None,
    ) -> None:
        num_cells = lender.arena.num_cells(group)
        limits = {tenant: num_cells * percent // 100 for tenant, percent in (quotas or {}).items()}
        self._lender = lender
        self._group = group
        self._on_evict = on_evict
        self._journal = journal
        self._references = array("i", bytes(4 * num_cells))
        self._lists = BlockLists(num_cells)
        self._free = self._lists.open()
        self._index = PrefixIndex(num_cells)
        self._order = EvictionOrder(self._lists, num_cells, clock, limits)
        self._slabs = self._slabs_of(lender, group)
        self._counts = self._slabs if isinstance(self._slabs, ManyBlockSlabs) else None
        self._contents = self._index.contents
        self._num_free = self._num_owned = 0
        lender.register(self)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Return `num_blocks` unshared blocks in one hand, or None, nothing changed but what was evicted."""
        while self._num_free < num_blocks:
            if not self._refill():
                return None
        return [self._take_free() for _ in range(num_blocks)]

    def share(self, block: int) -> None:
        """Put one more hand on a cached or owned block."""
        self.share_all((block,))

    def share_all(self, blocks: Iterable[int]) -> None:
        """Put one more hand on each of many blocks: a long prefix is found by one call."""
        references, counts, leave = self._references, self._counts, self._order.remove
        for block in blocks:
            if not references[block]:
                leave(block)
                self._num_owned += 1
                if counts is not None:
                    counts.count_owned(block, 1)
            references[block] += 1

    def release(self, block: int) -> None:
        """Take one hand off an owned block."""
        self.release_all((block,))

    def release_all(self, blocks: Iterable[int]) -> None:
        """Take one hand off each of many owned blocks; the first one is the first to be evicted."""
        references, counts, contents, push = self._references, self._counts, self._contents, self._order.push
        for block in blocks:
            count = references[block] - 1
            assert count >= 0, f"block {block} of group {self._group} is released more often than it is held"
            references[block] = count
            if count:
                continue
            self._num_owned -= 1
            if counts is not None:
                counts.count_owned(block, -1)
            if contents[block] is None:
                self._put_free(block)
            elif (surplus := push(block)) is not None:
                self._evict(surplus, remember=True)

    def find(self, digest: bytes, content: bytes) -> int | None:
        """Return the block with this content, or None. The bytes are compared: a digest alone proves nothing."""
        return self._index.find(digest, content)

    def find_run(self, digests: list[bytes], contents: list[bytes]) -> list[int]:
        """Return the blocks of a chain up to the first that is not found: `find` for many at once."""
        return self._index.find_run(digests, contents)

    def index(self, block: int, digest: bytes, content: bytes, keep: Keep = DEFAULT_KEEP) -> bool:
        """Make an owned, computed block findable; the first block with a digest keeps it. True if this one has it.

        `digest` is the hash of `content`, see `hashing.py`; `keep` says how long it stays once nobody owns it.
        """
        if not self._index.add(block, digest, content):
            return False
        self._order.keep(block, keep)
        if self._journal is not None:
            self._journal.stored(digest, content)
        return True

    def retain(self, block: int, keep: Keep) -> None:
        """Keep an owned block for longer, when another request that uses it wishes that and it is findable."""
        if self._contents[block] is not None:
            self._order.prolong(block, keep)

    def forget(self, digest: bytes, only: int = 0) -> None:
        """Make a block unfindable, if one has this digest; unless it is owned, it becomes free.

        Where `only` is not the null block, another block of this digest stays.
        """
        block = self._index.named(digest)
        if block is None or (only and block != only):
            return
        if self._references[block]:
            self._unname(block)
        else:
            self._evict(block)

    def was_evicted(self, digest: bytes) -> bool:
        """Say whether a block with this digest was dropped for its memory, as far back as is remembered."""
        return self._index.was_evicted(digest)

    def forget_all(self) -> None:
        """Empty the index; cached blocks become free and slabs without owned blocks go back to the lender."""
        for block in [*self._index.blocks()]:
            if self._references[block]:
                self._unname(block)
            else:
                self._evict(block)
        while (slab := self._slabs.first_idle()) is not None:
            self._drop_slab(slab)
            self._lender.take_back(slab)

    def surrender_slab(self, *, evict: bool) -> int | None:
        """Give up a slab without owned blocks: an idle one, else, when `evict`, the one of the first block to go."""
        slab = self._slabs.first_idle()
        if slab is None and evict:
            unowned = (block for block in self._order.in_order() if not self._slabs.is_owned_beside(block))
            slab = next((self._slabs.slab_of(block) for block in unowned), None)
        if slab is not None:
            self._drop_slab(slab)
        return slab

    @property
    def num_own_available(self) -> int:
        """Count the blocks that `allocate` could return without another slab."""
        return self._num_free + self._order.num_cached

    @property
    def slabs(self) -> Collection[int]:
        """The slabs that the group holds."""
        return self._slabs.held()

    def num_spare_slabs(self, num_spare_blocks: int) -> int:
        """Count the slabs that could surely be surrendered at the cost of `num_spare_blocks` unowned blocks."""
        return self._slabs.num_spare(num_spare_blocks)

    def usage(self) -> KVUsage:
        """Count the group's blocks by state."""
        num_lendable = self._lender.num_free * self._lender.arena.min_slab_blocks(self._group)
        return KVUsage(self._num_free, self._order.num_cached, self._num_owned, num_lendable)

    def digests(self) -> set[bytes]:
        """Return the digests of all findable blocks. Hashes each: for audits, not for steps."""
        return {digest_of(self._index.content(block)) for block in self._index.blocks()}

    def references(self) -> dict[int, int]:
        """Return the reference counts above zero, for integrity checks."""
        return dict(compress(enumerate(self._references), self._references))

    def check_integrity(self) -> None:
        """Assert that every block held is in exactly one state and that index and order are consistent."""
        self._index.check_integrity()
        findable = {*self._index.blocks()}
        free, cached = [*self._lists.blocks(self._free)], [*self._order.in_order()]
        owned = {*compress(count(), self._references)}
        self._order.check_integrity(cached, findable)
        held = [*chain.from_iterable(self._slabs.blocks())]
        assert 0 not in held, f"group {self._group}: the null block was lent"
        assert len(held) == len(set(held)), f"group {self._group}: slabs overlap"
        assert {*held} == {*free, *cached, *owned}, f"group {self._group}: blocks lost or foreign"
        assert len(held) == len(free) + len(cached) + len(owned), f"group {self._group}: a block is in two states"
        assert len(free) == self._num_free, f"group {self._group}: free count drifted"
        assert len(owned) == self._num_owned, f"group {self._group}: owned count drifted"
        assert findable.isdisjoint(free), f"group {self._group}: a free block is findable"
        self._slabs.check_integrity(free, owned)

    def _take_free(self) -> int:
        block = self._lists.pop(self._free)
        self._num_free -= 1
        self._num_owned += 1
        self._references[block] = 1
        if self._counts is not None:
            self._counts.count_used(block, 1)
            self._counts.count_owned(block, 1)
        return block

    def _put_free(self, block: int) -> None:
        self._lists.append(self._free, block)
        self._num_free += 1
        if self._counts is not None:
            self._counts.count_used(block, -1)

    def _refill(self) -> bool:
        """Make at least one more block free, at the least loss: idle memory first, cached prefixes last."""
        slab = self._lender.lend()
        if slab is None:
            slab = self._lender.lend_surrendered(self, evict=False)
        if slab is None:
            block = self._order.first()
            if block is not None:
                self._evict(block, remember=True)
                return True
            slab = self._lender.lend_surrendered(self, evict=True)
        if slab is None:
            return False
        for block in reversed(self._slabs.borrow(slab)):
            self._lists.append(self._free, block)
            self._num_free += 1
        return True

    def _drop_slab(self, slab: int) -> None:
        for block in self._lender.arena.slab_blocks(self._group, slab):
            if self._contents[block] is not None:
                self._evict(block, remember=True)
        for block in self._slabs.give_up(slab):
            self._lists.remove(block)
            self._num_free -= 1

    def _evict(self, block: int, remember: bool = False) -> None:
        """Make a cached block free. `remember` when its memory is needed, not when it is forgotten on purpose."""
        if remember and self._on_evict is not None:
            self._on_evict(block, digest_of(self._index.content(block)))
        self._order.remove(block)
        self._unname(block, evicted=remember)
        self._put_free(block)

    def _unname(self, block: int, evicted: bool = False) -> None:
        if self._journal is not None:
            self._journal.removed(self._index.content(block))
        self._index.remove(block, evicted=evicted)
        self._order.drop(block)

    def _slabs_of(self, lender: SlabLender, group: int) -> HeldSlabs:
        if lender.arena.slab_bytes == lender.arena.groups[group].layout.block_bytes:
            return OneBlockSlabs(lender.arena, group, lambda: self._lists.first(self._free))
        return ManyBlockSlabs(lender.arena, group)
