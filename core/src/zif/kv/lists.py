"""Ordered lists of blocks in flat memory: eight bytes a block, however many lists there are.

A block stands in one list at most, so one pair of links per block serves them all. Each list is a ring that is closed
by an *anchor*, a number beyond the blocks:

    anchor -> oldest block -> ... -> newest block -> anchor

`pool.py` keeps its free blocks here, `eviction.py` the cached ones.
"""

from array import array
from collections.abc import Iterator


class BlockLists:
    """Doubly linked lists over the block numbers below `num_blocks`. A list is named by its anchor."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._next = array("i", bytes(4 * num_blocks))
        self._previous = array("i", bytes(4 * num_blocks))
        self._unused_anchors: list[int] = []

    def open(self) -> int:
        """Return the anchor of a new, empty list."""
        if self._unused_anchors:
            return self._unused_anchors.pop()
        anchor = len(self._next)
        self._next.append(anchor)
        self._previous.append(anchor)
        return anchor

    def close(self, anchor: int) -> None:
        """End a list, which must be empty."""
        assert self._next[anchor] == anchor, "a list is closed that has blocks"
        self._unused_anchors.append(anchor)

    def append(self, anchor: int, block: int) -> None:
        """Put a block that stands in no list at the end of one."""
        newest = self._previous[anchor]
        self._next[newest] = block
        self._previous[block] = newest
        self._next[block] = anchor
        self._previous[anchor] = block

    def remove(self, block: int) -> None:
        """Take a block out of the list it stands in."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before

    def first(self, anchor: int) -> int | None:
        """Return the oldest block of a list."""
        block = self._next[anchor]
        return block if block < self._num_blocks else None

    def last(self, anchor: int) -> int | None:
        """Return the newest block of a list."""
        block = self._previous[anchor]
        return block if block < self._num_blocks else None

    def blocks(self, anchor: int) -> Iterator[int]:
        """Go through a list from the oldest block on; the list must not change meanwhile."""
        block = self._next[anchor]
        while block < self._num_blocks:
            assert self._previous[self._next[block]] == block, f"the links of block {block} do not meet"
            yield block
            block = self._next[block]
