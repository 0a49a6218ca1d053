"""The prefix index of one pool: from a block's digest and content to the block.

An open-addressing hash table of block numbers in flat memory, at most half full. Collisions go to the next slot;
removing shifts later blocks back, so that no tombstones are left:

    slot       ... | h | h+1 | h+2 | h+3 | ...
    block      ... | 7 |  4  |  0  |  9  | ...       0 is the null block: an empty slot
    key        64 bits of the digest, which decide the first slot

A key only says where to look: a hit compares the content, which holds the tokens and the parent's digest. The digest
itself is not kept; it is the hash of the content. Costs 20 to 28 bytes a cell, and the content of findable blocks.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import compress, count

_DIGEST_BYTES = 32
_NUM_EVICTED = 4096
"""Places for keys of evicted blocks: an eviction is remembered until another one falls on its place."""


class PrefixIndex:
    """Find blocks below `num_cells` by content. Two contents whose digests have the same key cannot both be found.

    `contents` are by block, None for those that are not findable.
    """

    def __init__(self, num_cells: int) -> None:
        num_slots = 1 << (2 * num_cells).bit_length()
        self._mask = num_slots - 1
        self._table = array("I", bytes(4 * num_slots))
        self._keys = array("Q", bytes(8 * num_cells))
        self.contents: list[bytes | None] = [None] * num_cells
        self._evicted = array("Q", bytes(8 * _NUM_EVICTED))
        self._num_blocks = 0

    def __len__(self) -> int:
        return self._num_blocks

    def content(self, block: int) -> bytes:
        """Return the content of a findable block."""
        content = self.contents[block]
        assert content is not None, f"block {block} is not indexed"
        return content

    def named(self, digest: bytes) -> int | None:
        """Return the block with this digest, whatever its content, or None."""
        return self._table[self._slot(_key(digest))] or None

    def find(self, digest: bytes, content: bytes) -> int | None:
        """Return the block with this digest and content, or None."""
        block = self._table[self._slot(_key(digest))]
        return block if block and self.contents[block] == content else None

    def find_run(self, digests: list[bytes], contents: list[bytes]) -> list[int]:
        """Return the blocks of a chain as far as it is found without a gap: `find` for many at once."""
        table, keys, mask = self._table, self._keys, self._mask
        found: list[int] = []
        for key in _keys(digests):
            slot = key & mask
            block = table[slot]
            while keys[block] != key:
                if not block:
                    return self._common(found, contents)
                slot = (slot + 1) & mask
                block = table[slot]
            found.append(block)
        return self._common(found, contents)

    def add(self, block: int, digest: bytes, content: bytes) -> bool:
        """Make a block findable, unless it is already, or another has this digest. True if it was added."""
        table, keys, contents, mask = self._table, self._keys, self.contents, self._mask
        key = int.from_bytes(digest[:8], "little") or 1
        slot = key & mask
        while (other := table[slot]) and keys[other] != key:
            slot = (slot + 1) & mask
        if other or contents[block] is not None:
            return False
        table[slot], keys[block], contents[block] = block, key, content
        self._num_blocks += 1
        return True

    def remove(self, block: int, *, evicted: bool) -> None:
        """Make a block unfindable; `was_evicted` answers for its digest later if its memory was needed."""
        key = self._keys[block]
        self._close_gap(self._slot(key))
        if evicted:
            self._evicted[key % _NUM_EVICTED] = key
        self._keys[block] = 0
        self.contents[block] = None
        self._num_blocks -= 1

    def was_evicted(self, digest: bytes) -> bool:
        """Say whether a block with this digest was dropped for its memory, if that was not too long ago."""
        key = _key(digest)
        return self._evicted[key % _NUM_EVICTED] == key

    def blocks(self) -> Iterator[int]:
        """Go through the findable blocks."""
        return compress(count(), self.contents)

    def check_integrity(self) -> None:
        """Assert that exactly the blocks with content are in the table, each where a search ends."""
        indexed = set(self.blocks())
        placed = [*filter(None, self._table)]
        assert len(placed) == len(indexed) == self._num_blocks, "the number of indexed blocks drifted"
        assert set(placed) == indexed, "the table holds other blocks than those with content"
        table, keys, mask = self._table, self._keys, self._mask
        for block in [block for block in placed if table[keys[block] & mask] != block]:
            assert table[self._slot(keys[block])] == block, f"indexed block {block} cannot be found"
        assert set(compress(count(), keys)) == indexed, "a block that is not indexed has a key"

    def _slot(self, key: int) -> int:
        """Return the slot of the block with this key, or the empty one where it would be put."""
        table, keys, mask = self._table, self._keys, self._mask
        slot = key & mask
        while (block := table[slot]) and keys[block] != key:
            slot = (slot + 1) & mask
        return slot

    def _close_gap(self, gap: int) -> None:
        """Empty a slot and shift back the blocks behind it that a search would no longer reach."""
        table, keys, mask = self._table, self._keys, self._mask
        slot = gap
        while block := table[slot := (slot + 1) & mask]:
            if (slot - keys[block]) & mask >= (slot - gap) & mask:
                table[gap] = block
                gap = slot
        table[gap] = 0

    def _common(self, found: list[int], contents: list[bytes]) -> list[int]:
        """Cut a run at the first block whose content is another."""
        held = [*map(self.contents.__getitem__, found)]
        if held == contents[: len(held)]:
            return found
        return found[: next(i for i, content in enumerate(held) if content != contents[i])]


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little") or 1


def _keys(digests: Sequence[bytes]) -> Sequence[int]:
    """Return the keys of many digests, in one go if they are of the usual length."""
    joined = b"".join(digests)
    if len(joined) != _DIGEST_BYTES * len(digests):
        return [*map(_key, digests)]
    words = array("Q", joined)
    if sys.byteorder == "big":
        words.byteswap()
    keys = words[:: _DIGEST_BYTES // words.itemsize]
    return keys if 0 not in keys else [key or 1 for key in keys]
