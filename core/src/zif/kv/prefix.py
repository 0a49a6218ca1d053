"""Find the longest computed prefix that every layer group can serve, and say why it is no longer.

Groups differ: full attention needs every block from the start, a window only its last ones, a recurrent state one
checkpoint. Each group may shorten the candidate; the search ends when none does. `manager.py` is the only caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from zif.contract import KVSpec, PrefixMiss, PrefixReport, Request
from zif.kv.hashing import PrefixChain
from zif.kv.pool import BlockPool


@dataclass(frozen=True, slots=True)
class Prefix:
    """A computed prefix: its length, and per group the blocks that hold what is needed of it.

    `junction` is where the found tokens end for want of a state to go on from: a checkpoint there would serve the next
    request with this prefix.
    """

    num_tokens: int
    block_ids: tuple[list[int], ...]
    report: PrefixReport
    junction: int | None = None


class PrefixFinder:
    """Search the indices of all groups for the prefixes of requests."""

    def __init__(self, specs: Sequence[KVSpec], pools: Sequence[BlockPool], alignment: int) -> None:
        self._specs = specs
        self._pools = pools
        self._alignment = alignment

    def nothing(self, report: PrefixReport) -> Prefix:
        """Return the empty prefix with its reason."""
        return Prefix(0, tuple([] for _ in self._specs), report)

    def find(self, request: Request, max_tokens: int) -> Prefix:
        """Return the longest prefix of at most `max_tokens`, a multiple of the alignment."""
        pairs = zip(self._specs, self._pools, strict=True)
        lookups = [_Lookup(spec, pool, PrefixChain(request, spec.block_size), max_tokens) for spec, pool in pairs]
        served = [self._served(lookup, max_tokens) for lookup in lookups]
        num_tokens = self._settle(lookups, min(served))
        report = self._report(lookups, served, num_tokens, max_tokens)
        return Prefix(
            num_tokens, tuple(lookup.table(num_tokens) for lookup in lookups), report, _junction(lookups, served)
        )

    def of_source(self, source: Request, max_tokens: int) -> Prefix:
        """Take over a running request's blocks up to `max_tokens`, unless some that are needed are gone."""
        num_tokens = max_tokens // self._alignment * self._alignment
        report = PrefixReport(num_tokens, max_tokens)
        tables = []
        for spec, held in zip(self._specs, source.block_ids, strict=True):
            first = spec.first_needed_block(num_tokens)
            needed = held[first : num_tokens // spec.block_size]
            if not all(needed):
                return self.nothing(PrefixReport(0, max_tokens, PrefixMiss.NOT_SEEN, spec.kind))
            tables.append([0] * first + needed)
        return Prefix(num_tokens, tuple(tables), report)

    def _served(self, lookup: "_Lookup", num_tokens: int) -> int:
        """Return how many of `num_tokens` one group can serve."""
        size = lookup.spec.block_size
        return lookup.spec.longest_prefix(num_tokens // size, lookup.found) * size // self._alignment * self._alignment

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
    """Find a request's blocks in one group's index, hashing and searching each block at most once."""

    def __init__(self, spec: KVSpec, pool: BlockPool, chain: PrefixChain, max_tokens: int) -> None:
        self.spec = spec
        self._pool = pool
        self._chain = chain
        self._blocks: dict[int, int | None] = {}
        chain.encode(max_tokens // spec.block_size)

    def found(self, block: int) -> bool:
        """Say whether a logical block is indexed."""
        return self._find(block) is not None

    def table(self, num_tokens: int) -> list[int]:
        """Return the block table of a prefix that was found: null blocks, then those that are needed."""
        first = self.spec.first_needed_block(num_tokens)
        blocks = [self._find(block) for block in range(first, num_tokens // self.spec.block_size)]
        assert None not in blocks, "a block of the prefix was found before and is gone"
        return [0] * first + [block for block in blocks if block]

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
            digest = self._chain.hashed(block)
            self._blocks[block] = self._pool.find(digest, self._chain.content(block))
        return self._blocks[block]


def _junction(lookups: list[_Lookup], served: list[int]) -> int | None:
    """Return where the groups that keep every block would have gone on, had there been a checkpoint."""
    dense = [count for lookup, count in zip(lookups, served, strict=True) if not lookup.spec.keeps_checkpoints]
    if len(dense) == len(served) or not dense or min(dense) <= min(served):
        return None
    return min(dense)
