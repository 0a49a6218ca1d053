"""Core's block manager: the pools of all layer groups, and prefix reuse across them.

A request's block table is one list per group, from logical block to block id. Blocks behind a window are returned
and leave the null block 0 in the table:

    group full       [ 7, 3, 9, 4 ]
    group sliding    [ 0, 0, 5, 6 ]        first needed logical block: 2
"""

import math
from collections import Counter
from collections.abc import Sequence

from zif.contract import BlockManager, KVArena, KVSpec, KVUsage, PrefixMiss, PrefixReport, Request
from zif.kv.checkpoints import CheckpointKeeper
from zif.kv.hashing import PrefixChain
from zif.kv.pool import BlockPool
from zif.kv.prefix import Prefix, PrefixFinder
from zif.kv.slabs import SlabLender


class PagedBlockManager(BlockManager):
    """Keep requests' blocks in per-group pools over one arena of slabs."""

    def __init__(self, arena: KVArena, *, enable_prefix_caching: bool, max_step_tokens: int) -> None:
        self._arena = arena
        self._caching = enable_prefix_caching
        self._max_step_tokens = max_step_tokens
        self._specs: list[KVSpec] = [group.spec for group in arena.groups]
        self._lender = SlabLender(arena)
        self._pools = [BlockPool(self._lender, group) for group in range(len(self._specs))]
        self._alignment = math.lcm(*(spec.block_size for spec in self._specs))
        self._index_interval = min(spec.block_size for spec in self._specs)
        self._finder = PrefixFinder(self._specs, self._pools, self._alignment)
        self._checkpoints = CheckpointKeeper(self._alignment)
        self._keeps_checkpoints = enable_prefix_caching and any(spec.keeps_checkpoints for spec in self._specs)

    def begin(self, request: Request, source: Request | None = None) -> None:
        assert not request.block_ids, f"request {request.request_id} already holds blocks"
        prefix = self._longest_prefix(request, source)
        for pool, blocks in zip(self._pools, prefix.block_ids, strict=True):
            for block in filter(None, blocks):
                pool.share(block)
        request.block_ids = prefix.block_ids
        if not request.num_preemptions:
            request.prefix = prefix.report
        request.num_computed_tokens = request.capacity = request.num_indexed_tokens = prefix.num_tokens
        if self._keeps_checkpoints:
            self._checkpoints.aim(request, prefix.junction)
        self._set_next_commit(request)

    def reserve(self, request: Request, num_tokens: int) -> bool:
        allocated: list[list[int]] = []
        for spec, pool, held in zip(self._specs, self._pools, request.block_ids, strict=True):
            num_blocks = spec.num_blocks(num_tokens)
            first = spec.first_written_block(len(held), num_tokens)
            blocks = pool.allocate(max(0, num_blocks - first))
            if blocks is None:
                for earlier, taken in zip(self._pools, allocated, strict=False):
                    _release_all(earlier, taken)
                return False
            allocated.append([0] * (min(first, num_blocks) - len(held)) + blocks)
        for held, blocks in zip(request.block_ids, allocated, strict=True):
            held.extend(blocks)
        pairs = zip(self._specs, request.block_ids, strict=True)
        request.capacity = min(len(held) * spec.block_size for spec, held in pairs)
        return True

    def step_end(self, request: Request, num_tokens: int) -> int:
        return self._checkpoints.step_end(request, num_tokens) if self._keeps_checkpoints else num_tokens

    def commit(self, request: Request) -> None:
        for group, (spec, pool) in enumerate(zip(self._specs, self._pools, strict=True)):
            blocks = request.block_ids[group]
            if self._caching:
                self._index_new_blocks(request, group)
            first_kept = spec.first_needed_block(request.num_indexed_tokens)
            for block in range(spec.first_needed_block(request.num_computed_tokens) - 1, first_kept - 1, -1):
                if blocks[block]:
                    pool.release(blocks[block])
                    blocks[block] = 0
        request.num_indexed_tokens = request.num_computed_tokens
        self._set_next_commit(request)

    def release(self, request: Request) -> None:
        for pool, blocks in zip(self._pools, request.block_ids, strict=False):
            # The tail goes first into the least-recently-used order: a prefix outlives what follows it.
            _release_all(pool, blocks[::-1])
        self._checkpoints.drop(request)
        request.block_ids = ()
        request.capacity = request.next_commit = request.num_indexed_tokens = 0

    def can_hold(self, request: Request, num_tokens: int) -> bool:
        needed, spare = 0, self._lender.num_free
        tables: Sequence[list[int]] = request.block_ids or [[] for _ in self._specs]
        for index, (spec, pool, held) in enumerate(zip(self._specs, self._pools, tables, strict=True)):
            wanted = spec.peak_blocks(num_tokens, self._max_step_tokens) - len(held) + held.count(0)
            missing = wanted - pool.num_own_available
            if missing > 0:
                needed += -(-missing // self._arena.min_slab_blocks(index))
            elif len(self._pools) > 1:
                spare += pool.num_spare_slabs(-missing)
        return needed <= spare

    def fits(self, num_tokens: int) -> bool:
        slabs = 0
        for index, spec in enumerate(self._specs):
            slabs += -(-spec.peak_blocks(num_tokens, self._max_step_tokens) // self._arena.min_slab_blocks(index))
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

    def _longest_prefix(self, request: Request, source: Request | None) -> Prefix:
        max_tokens = (request.num_tokens - 1) // self._alignment * self._alignment
        # Prompt log-probabilities need the logits of every prompt token, so nothing of the prompt may be skipped.
        if request.sampling.prompt_logprobs is not None:
            return self._finder.nothing(PrefixReport(0, max_tokens, PrefixMiss.PROMPT_LOGPROBS))
        if not max_tokens:
            return self._finder.nothing(PrefixReport(0, 0, PrefixMiss.SHORT_PROMPT))
        found = self._finder.nothing(PrefixReport(0, max_tokens, PrefixMiss.CACHING_OFF))
        if self._caching:
            found = self._finder.find(request, max_tokens)
        if source is not None:
            shared = self._finder.of_source(source, min(max_tokens, source.num_prompt_tokens))
            found = max(found, shared, key=lambda prefix: prefix.num_tokens)
        return found

    def _index_new_blocks(self, request: Request, group: int) -> None:
        spec, pool, blocks = self._specs[group], self._pools[group], request.block_ids[group]
        if spec.keeps_checkpoints and not self._checkpoints.wants(request):
            return
        chain = PrefixChain(request, spec.block_size)
        for block in spec.reusable_blocks(request.num_indexed_tokens, request.num_computed_tokens):
            chain.extend(block + 1)
            is_new = blocks[block] and pool.index(blocks[block], chain.digest(block), chain.content(block))
            if is_new and spec.keeps_checkpoints:
                self._checkpoints.made(request, group, pool, chain.digest(block))

    def _set_next_commit(self, request: Request) -> None:
        computed = request.num_computed_tokens
        upcoming = [spec.next_release(computed) for spec in self._specs]
        if self._caching:
            upcoming.append((computed // self._index_interval + 1) * self._index_interval)
        request.next_commit = min(upcoming)


def _release_all(pool: BlockPool, blocks: Sequence[int]) -> None:
    for block in filter(None, blocks):
        pool.release(block)
