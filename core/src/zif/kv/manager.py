"""Core's block manager: the pools of all layer groups, and prefix reuse across them.

A request's block table is one list per group, from logical block to block id. Blocks behind a window are returned
and leave the null block 0 in the table:

    group full       [ 7, 3, 9, 4 ]
    group sliding    [ 0, 0, 5, 6 ]        first visible logical block: 2
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from zif.contract import BlockManager, KVArena, KVUsage, Request
from zif.kv.groups import LayerGroup, layer_group
from zif.kv.hashing import PrefixChain
from zif.kv.pool import BlockPool
from zif.kv.slabs import SlabLender


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A computed prefix: its length, and per group the blocks that hold what is visible of it."""

    num_tokens: int
    block_ids: tuple[list[int], ...]


class PagedBlockManager(BlockManager):
    """Keep requests' blocks in per-group pools over one arena of slabs."""

    def __init__(self, arena: KVArena, *, enable_prefix_caching: bool, max_step_tokens: int) -> None:
        self._arena = arena
        self._caching = enable_prefix_caching
        self._max_step_tokens = max_step_tokens
        self._groups: list[LayerGroup] = [layer_group(group.spec) for group in arena.groups]
        self._lender = SlabLender(arena)
        self._pools = [BlockPool(self._lender, group) for group in range(len(self._groups))]
        self._alignment = math.lcm(*(group.block_size for group in self._groups))
        self._index_interval = min(group.block_size for group in self._groups)

    def begin(self, request: Request, source: Request | None = None) -> None:
        assert not request.block_ids, f"request {request.request_id} already holds blocks"
        prefix = self._longest_prefix(request, source)
        for pool, blocks in zip(self._pools, prefix.block_ids, strict=True):
            for block in filter(None, blocks):
                pool.share(block)
        request.block_ids = prefix.block_ids
        request.num_computed_tokens = request.capacity = request.num_indexed_tokens = prefix.num_tokens
        self._set_next_commit(request)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        allocated: list[list[int]] = []
        for group, pool, held in zip(self._groups, self._pools, request.block_ids, strict=True):
            blocks = pool.allocate(max(0, group.num_blocks(num_tokens) - len(held)))
            if blocks is None:
                for earlier, taken in zip(self._pools, allocated, strict=False):
                    _release_all(earlier, taken)
                return False
            allocated.append(blocks)
        for held, blocks in zip(request.block_ids, allocated, strict=True):
            held.extend(blocks)
        pairs = zip(self._groups, request.block_ids, strict=True)
        request.capacity = min(len(held) * group.block_size for group, held in pairs)
        return True

    def commit(self, request: Request) -> None:
        for group, pool, blocks in zip(self._groups, self._pools, request.block_ids, strict=True):
            if self._caching:
                self._index_new_blocks(request, group, pool, blocks)
            self._release_invisible(request.num_computed_tokens, group, pool, blocks)
        request.num_indexed_tokens = request.num_computed_tokens
        self._set_next_commit(request)

    def release(self, request: Request) -> None:
        for pool, blocks in zip(self._pools, request.block_ids, strict=False):
            # The tail goes first into the least-recently-used order: a prefix outlives what follows it.
            _release_all(pool, blocks[::-1])
        request.block_ids = ()
        request.capacity = request.next_commit = request.num_indexed_tokens = 0

    def can_hold(self, request: Request, num_tokens: int) -> bool:
        needed, spare = 0, self._lender.num_free
        tables: Sequence[list[int]] = request.block_ids or [[] for _ in self._groups]
        for index, (group, pool, held) in enumerate(zip(self._groups, self._pools, tables, strict=True)):
            wanted = group.peak_blocks(num_tokens, self._max_step_tokens) - len(held) + held.count(0)
            missing = wanted - pool.num_own_available
            if missing > 0:
                needed += -(-missing // self._arena.min_slab_blocks(index))
            elif len(self._pools) > 1:
                spare += pool.num_spare_slabs(-missing)
        return needed <= spare

    def fits(self, num_tokens: int) -> bool:
        slabs = 0
        for index, group in enumerate(self._groups):
            slabs += -(-group.peak_blocks(num_tokens, self._max_step_tokens) // self._arena.min_slab_blocks(index))
        return slabs < self._arena.num_slabs

    def usage(self) -> tuple[KVUsage, ...]:
        return tuple(pool.usage() for pool in self._pools)

    def reset_prefix_cache(self) -> None:
        for pool in self._pools:
            pool.forget_all()

    def check_integrity(self, live: list[Request]) -> None:
        for index, pool in enumerate(self._pools):
            pool.check_integrity()
            hands = Counter(block for r in live if r.block_ids for block in r.block_ids[index] if block)
            assert hands == pool.references(), f"group {index}: reference counts differ from the requests' tables"
        self._lender.check_integrity([slab for pool in self._pools for slab in pool.slabs])

    def _longest_prefix(self, request: Request, source: Request | None) -> _Prefix:
        limit = (request.num_tokens - 1) // self._alignment * self._alignment
        # Prompt log-probabilities need the logits of every prompt token, so nothing of the prompt may be skipped.
        if request.sampling.prompt_logprobs is not None:
            return self._none()
        found = self._indexed_prefix(request, limit) if self._caching else self._none()
        if source is not None:
            shared = self._shared_prefix(source, min(limit, source.num_prompt_tokens))
            found = max(found, shared, key=lambda prefix: prefix.num_tokens)
        return found

    def _indexed_prefix(self, request: Request, limit: int) -> _Prefix:
        """Shorten the candidate group by group until every group can serve it."""
        lookups = [
            _Lookup(PrefixChain(request, g.block_size), p) for g, p in zip(self._groups, self._pools, strict=True)
        ]
        num_tokens, settled = limit, False
        while num_tokens and not settled:
            settled = True
            for group, lookup in zip(self._groups, lookups, strict=True):
                blocks = group.longest_prefix(num_tokens // group.block_size, lookup.found)
                served = blocks * group.block_size // self._alignment * self._alignment
                settled &= served == num_tokens
                num_tokens = served
        if not num_tokens:
            return self._none()
        tables = []
        for group, lookup in zip(self._groups, lookups, strict=True):
            first = group.first_visible_block(num_tokens)
            tables.append([0] * first + [lookup.block(b) for b in range(first, num_tokens // group.block_size)])
        return _Prefix(num_tokens, tuple(tables))

    def _shared_prefix(self, source: Request, limit: int) -> _Prefix:
        """Take over the source's blocks up to `limit`, unless some that must be visible are gone."""
        num_tokens = limit // self._alignment * self._alignment
        tables = []
        for group, held in zip(self._groups, source.block_ids, strict=True):
            first = group.first_visible_block(num_tokens)
            visible = held[first : num_tokens // group.block_size]
            if not all(visible):
                return self._none()
            tables.append([0] * first + visible)
        return _Prefix(num_tokens, tuple(tables))

    def _none(self) -> _Prefix:
        return _Prefix(0, tuple([] for _ in self._groups))

    def _index_new_blocks(self, request: Request, group: LayerGroup, pool: BlockPool, blocks: list[int]) -> None:
        size = group.block_size
        chain = PrefixChain(request, size)
        end = request.num_computed_tokens // size
        chain.extend(end)
        for block in range(request.num_indexed_tokens // size, end):
            if blocks[block]:
                pool.index(blocks[block], chain.digest(block), chain.content(block))

    @staticmethod
    def _release_invisible(num_computed: int, group: LayerGroup, pool: BlockPool, blocks: list[int]) -> None:
        for block in range(group.first_visible_block(num_computed) - 1, -1, -1):
            if not blocks[block]:
                break
            pool.release(blocks[block])
            blocks[block] = 0

    def _set_next_commit(self, request: Request) -> None:
        computed = request.num_computed_tokens
        upcoming = [group.next_release(computed) for group in self._groups]
        if self._caching:
            upcoming.append((computed // self._index_interval + 1) * self._index_interval)
        request.next_commit = min(upcoming)


class _Lookup:
    """Find a request's blocks in one group's index, hashing and searching each block at most once."""

    def __init__(self, chain: PrefixChain, pool: BlockPool) -> None:
        self._chain = chain
        self._pool = pool
        self._blocks: dict[int, int | None] = {}

    def found(self, block: int) -> bool:
        return self._find(block) is not None

    def block(self, block: int) -> int:
        found = self._find(block)
        assert found is not None, f"logical block {block} was found before and is gone"
        return found

    def _find(self, block: int) -> int | None:
        if block not in self._blocks:
            self._chain.extend(block + 1)
            self._blocks[block] = self._pool.find(self._chain.digest(block), self._chain.content(block))
        return self._blocks[block]


def _release_all(pool: BlockPool, blocks: Sequence[int]) -> None:
    for block in filter(None, blocks):
        pool.release(block)
