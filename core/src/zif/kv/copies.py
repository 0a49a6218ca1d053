"""The part of a prefix that is found outside of the device: which copies, and how many tokens from which tier.

A token counts for the slowest tier that a block of it, of whatever group, comes from. `prefix.py` is the only caller.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zif.contract import KVSpec
from zif.kv.hashing import PrefixChain
from zif.kv.tiers import DEVICE, REMOTE, TierIndex


@dataclass(frozen=True, slots=True)
class FoundCopy:
    """A copy of logical block `index` of a request, by the name of its content."""

    index: int
    name: bytes
    tier: str


class CopyLookup:
    """Find copies of a request's blocks of one group, asking the remote tier at most once, for all blocks."""

    def __init__(self, tiers: TierIndex, group: int, chain: PrefixChain, num_blocks: int) -> None:
        self._tiers = tiers
        self._group = group
        self._chain = chain
        self._num_blocks = num_blocks
        self._in_remote: dict[int, bool] = {}

    def tier(self, block: int) -> str | None:
        """Return the name of the tier that has a copy of a logical block."""
        self._chain.extend(block + 1)
        tier = self._tiers.tier_of(self._group, self._chain.digest(block))
        if tier is None and self._tiers.has_remote and self._is_in_remote(block):
            return REMOTE
        return tier

    def copy(self, block: int) -> FoundCopy:
        """Return the copy of a logical block that was found."""
        tier = self.tier(block)
        assert tier is not None, f"block {block} of the prefix was found before and is gone"
        return FoundCopy(block, self._chain.digest(block), tier)

    def _is_in_remote(self, block: int) -> bool:
        if not self._in_remote:
            self._chain.extend(self._num_blocks)
            names = [self._chain.digest(b) for b in range(self._num_blocks)]
            self._in_remote = dict(enumerate(self._tiers.in_remote(self._group, names)))
        return self._in_remote[block]


def tokens_by_tier(
    tiers: Sequence[str], specs: Sequence[KVSpec], copies: Sequence[Sequence[FoundCopy]], num_tokens: int
) -> tuple[tuple[str, int], ...]:
    """Count the tokens of a prefix by tier. `tiers` are in order, the device's first; `copies` are by group."""
    unit = math.gcd(*(spec.block_size for spec in specs))
    slowest: dict[int, int] = {}
    for spec, found in zip(specs, copies, strict=True):
        size = spec.block_size // unit
        for copy in found:
            level = tiers.index(copy.tier)
            for part in range(copy.index * size, (copy.index + 1) * size):
                slowest[part] = max(level, slowest.get(part, 0))
    counts = [unit * sum(level == at for at in slowest.values()) for level in range(len(tiers))]
    counts[tiers.index(DEVICE)] = num_tokens - sum(counts)
    return tuple(zip(tiers, counts, strict=True))
