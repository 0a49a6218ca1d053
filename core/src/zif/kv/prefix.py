"""Find the longest computed prefix that every layer group can serve, and say why it is no longer.

Groups differ: full attention needs every block from the start, a window only its last ones, a recurrent state one
checkpoint. Each group may shorten the candidate; the search ends when none does. Blocks that the device does not
have may be found as copies in other tiers. `manager.py` is the only caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from zif.contract import KVSpec, PrefixMiss, PrefixReport, Request
from zif.kv.copies import CopyLookup, FoundCopy, tokens_by_tier
from zif.kv.encoded import EncodedBlocks
from zif.kv.hashing import PrefixChain
from zif.kv.pool import BlockPool
from zif.kv.tiers import TierIndex

_RUN_BLOCKS = 64
"""Blocks that are hashed and searched at once, until one is not found."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A computed prefix: its length, and per group the blocks that hold what is needed of it.

    `copies` are by group the blocks that have to be loaded first; the tables hold null blocks in their places.
    `junction` is where the found tokens end for want of a state to go on from: a checkpoint there would serve the next
    request with this prefix.
    """

    num_tokens: int
    block_ids: tuple[list[int], ...]
    report: PrefixReport
    copies: tuple[list[FoundCopy], ...] = ()
    junction: int | None = None


class PrefixFinder:
    """Search the indices of all groups for the prefixes of requests, and `tiers` for copies."""

    def __init__(
        self, specs: Sequence[KVSpec], pools: Sequence[BlockPool], alignment: int, tiers: TierIndex | None = None
    ) -> None:
        self._specs = specs
        self._pools = pools
        self._alignment = alignment
        self._tiers = tiers
        self._groups = [group for group, spec in enumerate(specs) if not spec.counts_encoder_tokens]
        self._encoded_groups = [group for group, spec in enumerate(specs) if spec.counts_encoder_tokens]

    def nothing(self, report: PrefixReport) -> Prefix:
        """Return the empty prefix with its reason."""
        return Prefix(0, tuple([] for _ in self._specs), report)

    def find(self, request: Request, max_tokens: int) -> Prefix:
        """Return the longest prefix of at most `max_tokens`, a multiple of the alignment."""
        encoded = self._encoded(request)
        if encoded is None:
            return self.nothing(PrefixReport(0, max_tokens, PrefixMiss.NOT_SEEN, "cross"))
        lookups = [self._lookup(request, group, max_tokens) for group in self._groups]
        served = [self._served(lookup, max_tokens) for lookup in lookups]
        num_tokens = self._settle(lookups, min(served))
        report = self._report(lookups, served, num_tokens, max_tokens)
        found = {group: lookup.table(num_tokens) for group, lookup in zip(self._groups, lookups, strict=True)}
        # A request that begins at its first token writes the encoder's output itself.
        found |= {group: blocks if num_tokens else [] for group, blocks in encoded.items()}
        tables = tuple(found[group] for group in range(len(self._specs)))
        if self._tiers is None:
            return Prefix(num_tokens, tables, report, junction=_junction(lookups, served))
        by_group = dict(zip(self._groups, (lookup.copies(num_tokens) for lookup in lookups), strict=True))
        copies = tuple(by_group.get(group, []) for group in range(len(self._specs)))
        report = replace(report, by_tier=tokens_by_tier(self._tiers.names, self._specs, copies, num_tokens))
        return Prefix(num_tokens, tables, report, copies if any(copies) else (), _junction(lookups, served))

    def of_source(self, source: Request, max_tokens: int) -> Prefix:
        """Take over a running request's blocks up to `max_tokens`, unless some that are needed are gone."""
        num_tokens = max_tokens // self._alignment * self._alignment
        report = PrefixReport(num_tokens, max_tokens)
        tables = []
        for spec, held in zip(self._specs, source.block_ids, strict=True):
            if spec.counts_encoder_tokens:
                tables.append(held.copy() if num_tokens else [])
                continue
            first = spec.first_needed_block(num_tokens)
            needed = held[first : num_tokens // spec.block_size]
            if not all(needed):
                return self.nothing(PrefixReport(0, max_tokens, PrefixMiss.NOT_SEEN, spec.kind))
            tables.append([0] * first + needed)
        return Prefix(num_tokens, tuple(tables), report)

    def _encoded(self, request: Request) -> dict[int, list[int]] | None:
        """Return the blocks of the encoder's output by group, None unless all are found."""
        tables: dict[int, list[int]] = {}
        for group in self._encoded_groups:
            encoded, pool = EncodedBlocks(request, self._specs[group]), self._pools[group]
            found = (pool.find(encoded.digest(b), encoded.content(b)) for b in range(encoded.num_blocks))
            tables[group] = [block for block in found if block is not None]
            if len(tables[group]) < encoded.num_blocks:
                return None
        return tables

    def _lookup(self, request: Request, group: int, max_tokens: int) -> "_Lookup":
        spec = self._specs[group]
        chain = PrefixChain(request, spec.block_size)
        copies = CopyLookup(self._tiers, group, chain, max_tokens // spec.block_size) if self._tiers else None
        return _Lookup(spec, self._pools[group], chain, max_tokens, copies)

    def _served(self, lookup: "_Lookup", num_tokens: int) -> int:
        """Return how many of `num_tokens` one group can serve."""
        size = lookup.spec.block_size
        num_blocks = num_tokens // size
        if lookup.num_run < num_blocks:
            num_blocks = lookup.spec.longest_prefix(num_blocks, lookup.found)
        return num_blocks * size // self._alignment * self._alignment

    def _settle(self, lookups: "list[_Lookup]", num_tokens: int) -> int:
        settled = len(lookups) == 1
        while num_tokens and not settled:
            settled = True
            for lookup in lookups:
                served = self._served(lookup, num_tokens)
                settled &= served == num_tokens
                num_tokens = served
        return num_tokens

    def _report(self, lookups: "list[_Lookup]", served: list[int], num_tokens: int, max_tokens: int) -> PrefixReport:
        if num_tokens == max_tokens:
            return PrefixReport(num_tokens, max_tokens)
        ending = lookups[served.index(min(served))]
        return PrefixReport(num_tokens, max_tokens, ending.miss(max_tokens, max(served)), ending.spec.kind)


class _Lookup:
    """Find a request's blocks in one group's index, hashing and searching each block at most once.

    `num_run` blocks from the first on were found at once; every kind can go on after all of them.
    """

    def __init__(
        self, spec: KVSpec, pool: BlockPool, chain: PrefixChain, max_tokens: int, copies: CopyLookup | None
    ) -> None:
        self.spec = spec
        self._copies = copies
        self._pool = pool
        self._chain = chain
        self._blocks: dict[int, int | None] = {}
        self.num_run = 0
        if not spec.first_needed_block(max_tokens):
            self._find_run(max_tokens // spec.block_size)

    def found(self, block: int) -> bool:
        """Say whether a logical block is indexed, or a copy of it is kept."""
        blocks = self._blocks
        if (blocks[block] if block in blocks else self._find(block)) is not None:
            return True
        return self._copies is not None and self._copies.tier(block) is not None

    def table(self, num_tokens: int) -> list[int]:
        """Return the block table of a prefix that was found: null blocks, then those that are needed."""
        first = self.spec.first_needed_block(num_tokens)
        blocks = [self._blocks[block] or 0 for block in range(first, num_tokens // self.spec.block_size)]
        assert self._copies or 0 not in blocks, "a block of the prefix was found before and is gone"
        return [0] * first + blocks

    def copies(self, num_tokens: int) -> list[FoundCopy]:
        """Return the copies of those blocks of a prefix that the device does not have."""
        if self._copies is None:
            return []
        needed = range(self.spec.first_needed_block(num_tokens), num_tokens // self.spec.block_size)
        return [self._copies.copy(block) for block in needed if self._blocks[block] is None]

    def miss(self, max_tokens: int, max_served: int) -> PrefixMiss:
        """Say why this group ended the prefix before `max_tokens`; the best group served `max_served`."""
        if self.spec.keeps_checkpoints and max_served:
            return PrefixMiss.NO_CHECKPOINT
        size = self.spec.block_size
        missing = (b for b in range(self.spec.first_needed_block(max_tokens), max_tokens // size) if not self.found(b))
        first = next(missing, None)
        evicted = first is not None and self._pool.was_evicted(self._chain.digest(first))
        return PrefixMiss.EVICTED if evicted else PrefixMiss.NOT_SEEN

    def _find(self, block: int) -> int | None:
        if block not in self._blocks:
            self._chain.extend(block + 1)
            self._blocks[block] = self._pool.find(self._chain.digest(block), self._chain.content(block))
        return self._blocks[block]

    def _find_run(self, num_blocks: int) -> None:
        """Find the blocks before the first gap, many at once: for kinds that need each of them."""
        chain, first, end = self._chain, 0, 0
        while end < num_blocks and len(self._blocks) == end:
            first, end = end, min(num_blocks, max(chain.num_hashed, end + _RUN_BLOCKS))
            contents = chain.contents(first, end)
            found = self._pool.find_run(chain.digests(first, end), contents)
            self._blocks.update(enumerate(found, first))
        self.num_run = len(self._blocks)


def _junction(lookups: list[_Lookup], served: list[int]) -> int | None:
    """Return where the groups that keep every block would have gone on, had there been a checkpoint."""
    dense = [count for lookup, count in zip(lookups, served, strict=True) if not lookup.spec.keeps_checkpoints]
    if len(dense) == len(served) or not dense or min(dense) <= min(served):
        return None
    return min(dense)
