"""Core's block manager: the pools of all layer groups, and prefix reuse across them.

A request's block table is one list per group, from logical block to block id. Blocks behind a window are returned
and leave the null block 0 in the table:

    group full       [ 7, 3, 9, 4 ]
    group sliding    [ 0, 0, 5, 6 ]        first needed logical block: 2
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain, repeat

from zif.contract import (
    BlockManager,
    HiddenRows,
    KVArena,
    KVSpec,
    KVUsage,
    PrefixMiss,
    PrefixReport,
    Request,
    Transfers,
)
from zif.kv.checkpoints import CheckpointKeeper
from zif.kv.drafts import DraftSlots
from zif.kv.encoded import EncodedBlocks
from zif.kv.hashing import PrefixChain
from zif.kv.journal import BlockJournal, GroupJournal
from zif.kv.loading import LoadLedger, TableCopy
from zif.kv.names import block_names
from zif.kv.pool import BlockPool
from zif.kv.prefix import Prefix, PrefixFinder
from zif.kv.retention import Retainer
from zif.kv.slabs import SlabLender
from zif.kv.swap import SwappedRequest, SwapSpace
from zif.kv.tiers import TierIndex, TierSetup


class PagedBlockManager(BlockManager):
    """Keep requests' blocks in per-group pools over one arena of slabs, and copies of them in the tiers below.

    `journal` hears which blocks of the device can be found; those of encoders' outputs are not in it.
    """

    def __init__(
        self,
        arena: KVArena,
        *,
        enable_prefix_caching: bool,
        max_step_tokens: int,
        retainer: Retainer | None = None,
        tiers: TierSetup = TierSetup(),  # noqa: B008 - frozen value
        journal: BlockJournal | None = None,
    ) -> None:
        self._arena = arena
        self._caching = enable_prefix_caching
        self._max_step_tokens = max_step_tokens
        self._specs: list[KVSpec] = [group.spec for group in arena.groups]
        self._lender = SlabLender(arena)
        self._retainer = retainer or Retainer()
        self._journal = journal
        self._tiers = TierIndex(tiers, [group.layout.block_bytes for group in arena.groups])
        self._pools = [
            BlockPool(
                self._lender,
                group,
                clock=self._retainer.clock,
                quotas=self._retainer.quotas,
                on_evict=partial(self._tiers.keep, group) if self._keeps_copies(group, tiers) else None,
                journal=self._journal_of(group),
            )
            for group in range(len(self._specs))
        ]
        sizes = [spec.block_size for spec in self._specs if not spec.counts_encoder_tokens]
        self._alignment = math.lcm(*sizes)
        self._index_interval = min(sizes)
        self._device_finder = PrefixFinder(self._specs, self._pools, self._alignment)
        self._finder = self._device_finder
        if len(self._tiers.names) > 1:
            self._finder = PrefixFinder(self._specs, self._pools, self._alignment, self._tiers)
        self._loads = LoadLedger(self._pools, self._tiers)
        self._swaps = SwapSpace(tiers, self._specs, self._tiers)
        self._checkpoints = CheckpointKeeper(self._alignment)
        self._drafts = DraftSlots(self._specs, self._pools)
        self._keeps_checkpoints = enable_prefix_caching and any(spec.keeps_checkpoints for spec in self._specs)

    @property
    def serves_hidden(self) -> bool:
        return True

    def begin(self, request: Request, source: Request | None = None) -> None:
        assert not request.block_ids, f"request {request.request_id} already holds blocks"
        if source is not None and source in self._loads:
            source = None  # What it holds is not known to be right yet.
        swapped = self._swaps.resume(request)
        if swapped is None or not self._resume(request, swapped):
            self._begin(request, source)

    def _begin(self, request: Request, source: Request | None) -> None:
        """Begin with what is found of the prefix."""
        prefix = self._longest_prefix(request, source, self._finder)
        self._share(request, prefix)
        if prefix.copies and not self._fill(request, prefix):
            self._return_blocks(request)
            prefix = self._longest_prefix(request, source, self._device_finder)
            self._share(request, prefix)
        if not (request.num_preemptions or request.num_recoveries):
            request.prefix = prefix.report
        request.num_computed_tokens = request.capacity = request.num_indexed_tokens = prefix.num_tokens
        self._aim(request, prefix.junction)
        if prefix.copies:
            pairs = zip(self._specs, prefix.copies, strict=True)
            firsts = [found[0].index * spec.block_size for spec, found in pairs if found]
            self._index_soon(request, min(firsts))

    def _resume(self, request: Request, swapped: SwappedRequest) -> bool:
        """Begin where a request was when it was suspended. False, and nothing done, when there are no blocks."""
        num_tokens = swapped.num_tokens
        request.block_ids = tuple([0] * _num_blocks(spec, request, num_tokens) for spec in self._specs)
        for copy in swapped.blocks:
            self._tiers.pin_handle(copy.handle)
        if not self._loads.fill(request, swapped.blocks):
            request.block_ids = ()
            return False
        self._retainer.begin(request)
        request.num_computed_tokens = num_tokens
        self._set_capacity(request)
        self._aim(request, None)
        self._index_soon(request, 0)
        return True

    def _share(self, request: Request, prefix: Prefix) -> None:
        for pool, blocks in zip(self._pools, prefix.block_ids, strict=True):
            pool.share_all(filter(None, blocks))
        request.block_ids = prefix.block_ids
        self._retain_shared(request)

    def _fill(self, request: Request, prefix: Prefix) -> bool:
        """Let the blocks of a prefix that the device does not have be loaded. False when there is no room for them."""
        return self._loads.fill(
            request,
            [
                TableCopy(group, copy.index, self._tiers.pin(group, copy.name))
                for group, copies in enumerate(prefix.copies)
                for copy in copies
            ],
        )

    def _aim(self, request: Request, junction: int | None) -> None:
        if self._keeps_checkpoints:
            self._checkpoints.aim(request, junction)
        self._set_next_commit(request)

    def _index_soon(self, request: Request, first_token: int) -> None:
        """Let the first result index the blocks that are loaded now, the first of which begins with `first_token`."""
        request.num_indexed_tokens = first_token
        request.next_commit = request.num_computed_tokens + 1

    def reserve(self, request: Request, num_tokens: int) -> bool:
        return self._reserve(request, num_tokens, is_draft=False)

    @property
    def drafts_are_atomic(self) -> bool:
        return any(spec.keeps_checkpoints for spec in self._specs)

    def reserve_draft(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        if not self._reserve(request, num_tokens, is_draft=True):
            return None
        spares = self._drafts.take(request)
        if spares is None:
            self._drafts.trim(request)
            self._set_capacity(request)
        return spares

    def settle_draft(self, request: Request, *, all_accepted: bool) -> None:
        self._drafts.settle(request, all_accepted=all_accepted)
        self._set_capacity(request)

    def _reserve(self, request: Request, num_tokens: int, *, is_draft: bool) -> bool:
        """Extend the tables; where a draft would spoil a state, its group's table stays as it is."""
        allocated: list[list[int]] = []
        for spec, pool, held in zip(self._specs, self._pools, request.block_ids, strict=True):
            num_blocks = len(held) if is_draft and spec.keeps_checkpoints else _num_blocks(spec, request, num_tokens)
            first = spec.first_written_block(len(held), num_tokens)
            blocks = pool.allocate(max(0, num_blocks - first))
            if blocks is None:
                for earlier, taken in zip(self._pools, allocated, strict=False):
                    _release_all(earlier, taken)
                return False
            allocated.append([0] * (min(first, num_blocks) - len(held)) + blocks)
        for spec, pool, held, blocks in zip(self._specs, self._pools, request.block_ids, allocated, strict=True):
            held.extend(blocks)
            if blocks and spec.keeps_checkpoints:
                self._return_skipped(request, spec, pool, held)
        self._set_capacity(request)
        return True

    def _return_skipped(self, request: Request, spec: KVSpec, pool: BlockPool, held: list[int]) -> None:
        """Return blocks for states after a row that has since been made longer: only the last one is written."""
        num_tokens = max(request.num_computed_tokens, request.num_planned_tokens)
        for block in range(spec.num_blocks(num_tokens), len(held) - 1):
            if held[block]:
                pool.release(held[block])
                held[block] = 0

    def _set_capacity(self, request: Request) -> None:
        pairs = zip(self._specs, request.block_ids, strict=True)
        request.capacity = min(len(held) * spec.block_size for spec, held in pairs if not spec.counts_encoder_tokens)

    def step_end(self, request: Request, num_tokens: int) -> int:
        return self._checkpoints.step_end(request, num_tokens) if self._keeps_checkpoints else num_tokens

    def suspend(self, request: Request) -> None:
        swapped = None
        if self._swaps.is_open and request not in self._swaps and request not in self._loads:
            found_again = self._longest_prefix(request, None, self._device_finder)
            swapped = self._swaps.copy_out(request, found_again.num_tokens)
        self.release(request)
        if swapped is not None:
            self._swaps.keep(request, swapped)

    def take_transfers(self) -> Transfers | None:
        self._swaps.settle()
        self._loads.taken()
        return self._tiers.take()

    def forget_lost(self, handles: Sequence[int]) -> list[Request]:
        for handle in handles:
            self._tiers.forget_lost(handle)
        return self._loads.holders(handles)

    def commit(self, request: Request) -> None:
        self._loads.confirm(request)
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
        self._loads.withdraw(request)
        self._swaps.release(request)
        self._return_blocks(request)
        self._checkpoints.drop(request)
        self._drafts.drop(request)
        self._retainer.drop(request)
        request.capacity = request.next_commit = request.num_indexed_tokens = 0

    def quarantine(self, request: Request) -> None:
        for group, (spec, pool) in enumerate(zip(self._specs, self._pools, strict=True)):
            # Where the request holds no block any more, whichever has the name may be the one that it wrote.
            for name, block in zip(
                block_names(request, spec), chain(request.block_ids[group], repeat(0)), strict=False
            ):
                pool.forget(name, only=block)
                self._tiers.forget(group, name)

    def can_hold(self, request: Request, num_tokens: int) -> bool:
        needed, spare = 0, self._lender.num_free
        tables: Sequence[list[int]] = request.block_ids or [[] for _ in self._specs]
        for index, (spec, pool, held) in enumerate(zip(self._specs, self._pools, tables, strict=True)):
            peak = spec.peak_blocks(num_tokens, self._max_step_tokens)
            if spec.counts_encoder_tokens:
                peak = _num_blocks(spec, request, num_tokens)
            missing = peak - len(held) + held.count(0) - pool.num_own_available
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
        self.free_cached_blocks()
        self._tiers.discard_named()

    def free_cached_blocks(self) -> None:
        for pool in self._pools:
            pool.forget_all()
        if self._journal is not None:
            self._journal.cleared()

    def census(self) -> tuple[set[bytes], ...]:
        """Return the digests of what can be found on the device, by layer group. For audits: it hashes every block."""
        return tuple(pool.digests() for pool in self._pools)

    def check_integrity(self, live: list[Request]) -> None:
        held = []
        for index, pool in enumerate(self._pools):
            pool.check_integrity()
            tables = [request.block_ids[index] for request in live if request.block_ids]
            hands = Counter(filter(None, chain.from_iterable(tables)))
            hands.update(self._drafts.hands(index))
            assert hands == pool.references(), f"group {index}: reference counts differ from the requests' tables"
            held.append(set(hands))
        self._tiers.check_integrity(self._swaps.handles(), held)
        self._swaps.check_integrity(live)
        self._lender.check_integrity([slab for pool in self._pools for slab in pool.slabs])

    def _longest_prefix(self, request: Request, source: Request | None, finder: PrefixFinder) -> Prefix:
        max_tokens = (request.num_tokens - 1) // self._alignment * self._alignment
        # Prompt log-probabilities need the logits of every prompt token, so nothing of the prompt may be skipped.
        if request.sampling.prompt_logprobs is not None:
            return finder.nothing(PrefixReport(0, max_tokens, PrefixMiss.PROMPT_LOGPROBS))
        if request.hidden is HiddenRows.ALL:
            return finder.nothing(PrefixReport(0, max_tokens, PrefixMiss.HIDDEN_STATES))
        if not max_tokens:
            return finder.nothing(PrefixReport(0, 0, PrefixMiss.SHORT_PROMPT))
        found = finder.nothing(PrefixReport(0, max_tokens, PrefixMiss.CACHING_OFF))
        if request.distrusts_cache:
            return found
        if self._caching:
            found = finder.find(request, max_tokens)
        if source is not None:
            shared = finder.of_source(source, min(max_tokens, source.num_prompt_tokens))
            found = max(found, shared, key=lambda prefix: prefix.num_tokens)
        return found

    def _index_new_blocks(self, request: Request, group: int) -> None:
        spec, pool, blocks = self._specs[group], self._pools[group], request.block_ids[group]
        if spec.counts_encoder_tokens:
            self._index_encoded(request, spec, pool, blocks)
            return
        if spec.keeps_checkpoints and not self._checkpoints.wants(request):
            return
        chain = PrefixChain(request, spec.block_size)
        new = spec.reusable_blocks(request.num_indexed_tokens, request.num_computed_tokens)
        for block, content in zip(new, chain.contents(new.start, new.stop) if new else (), strict=True):
            keep = self._retainer.keep(request, block * spec.block_size, (block + 1) * spec.block_size)
            is_new = blocks[block] and pool.index(blocks[block], chain.digest(block), content, keep)
            if is_new and spec.keeps_checkpoints:
                self._checkpoints.made(request, group, pool, chain.digest(block))

    def _index_encoded(self, request: Request, spec: KVSpec, pool: BlockPool, blocks: list[int]) -> None:
        """Index what the first step of a request wrote of the encoder's output."""
        if request.num_indexed_tokens or not blocks:
            return
        encoded = EncodedBlocks(request, spec)
        keep = self._retainer.keep(request, 0, request.num_prompt_tokens)
        for index, block in enumerate(blocks):
            pool.index(block, encoded.digest(index), encoded.content(index), keep)

    def _journal_of(self, group: int) -> GroupJournal | None:
        spec = self._specs[group]
        if self._journal is None or spec.counts_encoder_tokens:
            return None
        return self._journal.of_group(group, spec.block_size)

    def _keeps_copies(self, group: int, tiers: TierSetup) -> bool:
        return bool(tiers.host_bytes or tiers.disk_bytes) and not self._specs[group].counts_encoder_tokens

    def _retain_shared(self, request: Request) -> None:
        """Let the wishes of a request extend to the blocks that it found."""
        self._retainer.begin(request)
        if not request.retention:
            return
        for spec, pool, blocks in zip(self._specs, self._pools, request.block_ids, strict=True):
            for index, block in enumerate(blocks):
                if block:
                    start = index * spec.block_size
                    pool.retain(block, self._retainer.keep(request, start, start + spec.block_size))

    def _return_blocks(self, request: Request) -> None:
        for pool, blocks in zip(self._pools, request.block_ids, strict=False):
            # The tail goes first into the least-recently-used order: a prefix outlives what follows it.
            _release_all(pool, blocks[::-1])
        request.block_ids = ()

    def _set_next_commit(self, request: Request) -> None:
        computed = request.num_computed_tokens
        upcoming = [spec.next_release(computed) for spec in self._specs]
        if self._caching:
            upcoming.append((computed // self._index_interval + 1) * self._index_interval)
        request.next_commit = min(upcoming)


def _num_blocks(spec: KVSpec, request: Request, num_tokens: int) -> int:
    return spec.num_blocks(spec.held_tokens(num_tokens, request.num_encoder_tokens))


def _release_all(pool: BlockPool, blocks: Sequence[int]) -> None:
    pool.release_all(filter(None, blocks))
