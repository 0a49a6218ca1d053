"""Ordered lists of blocks in flat memory: eight bytes a block, however many lists there are.

A block stands in one list at most, so one pair of links per block serves them all. Each list is a ring that is closed
by an *anchor*, a number beyond the blocks:

    anchor -> oldest block -> ... -> newest block -> anchor

`pool.py` keeps its free blocks here, `eviction.py` the cached ones.
"""

from array import array
from collections.abc import Iterator


class BlockLists:
    """Doubly linked lists over the block numbers below `num_blocks`. A list is named by its anchor.

    The links are public for callers that move a block so often that a call is too much.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self.next = array("i", bytes(4 * num_blocks))
        self.previous = array("i", bytes(4 * num_blocks))
        self._unused_anchors: list[int] = []

    def open(self) -> int:
        """Return the anchor of a new, empty list."""
        if self._unused_anchors:
            return self._unused_anchors.pop()
        anchor = len(self.next)
        self.next.append(anchor)
        self.previous.append(anchor)
        return anchor

    def close(self, anchor: int) -> None:
        """End a list, which must be empty."""
        assert self.next[anchor] == anchor, "a list is closed that has blocks"
        self._unused_anchors.append(anchor)

    def append(self, anchor: int, block: int) -> None:
        """Put a block that stands in no list at the end of one."""
        newest = self.previous[anchor]
        self.next[newest] = block
        self.previous[block] = newest
        self.next[block] = anchor
        self.previous[anchor] = block

    def remove(self, block: int) -> None:
        """Take a block out of the list it stands in."""
        before, after = self.previous[block], self.next[block]
        self.next[before] = after
        self.previous[after] = before

    def first(self, anchor: int) -> int | None:
        """Return the oldest block of a list."""
        block = self.next[anchor]
        return block if block < self._num_blocks else None

    def pop(self, anchor: int) -> int:
        """Take the newest block out of a list, which must not be empty."""
        block = self.previous[anchor]
        assert block < self._num_blocks, "the list is empty"
        before = self.previous[anchor] = self.previous[block]
        self.next[before] = anchor
        return block

    def blocks(self, anchor: int) -> Iterator[int]:
        """Go through a list from the oldest block on; the list must not change meanwhile."""
        before, block = anchor, self.next[anchor]
        while block < self._num_blocks:
            assert self.previous[block] == before, f"the links of block {block} do not meet"
            yield block
            before, block = block, self.next[block]
        assert (block, self.previous[anchor]) == (anchor, before), "a list of blocks does not end where it began"
