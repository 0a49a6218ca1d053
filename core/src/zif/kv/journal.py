"""What became findable and what no longer is: the journal that tells a cache index outside of the engine.

The pools write, one line per block; who serves the engine takes what was written after each step. Blocks of one chain
that come one after another are one entry. Without a reader there is no journal, and nothing is written.
"""

import struct
from dataclasses import dataclass

from zif.contract import CacheKey
from zif.kv.hashing import digest_of, is_root, root_content


@dataclass(slots=True)
class BlocksStored:
    """Blocks of one layer group that became findable; each is the parent of the next.

    `parent` is the digest of the block before the first one, None at the start of a prompt. `token_ids` are the tokens
    of all blocks. `condition` names what besides tokens decides the content of a chain that starts here (salt,
    adapter, media): equal names, equal conditions; None when nothing does.
    """

    group: int
    digests: list[bytes]
    parent: bytes | None
    token_ids: list[int]
    block_size: int
    condition: bytes | None = None


@dataclass(slots=True)
class BlocksRemoved:
    """Blocks of one layer group that can no longer be found."""

    group: int
    digests: list[bytes]


@dataclass(slots=True)
class AllCleared:
    """Nothing can be found any more, in no group."""


BlockEvent = BlocksStored | BlocksRemoved | AllCleared


class BlockJournal:
    """Changes of what is findable, in order, until they are taken. `PagedBlockManager` takes one when it is made."""

    def __init__(self) -> None:
        self._events: list[BlockEvent] = []

    def of_group(self, group: int, block_size: int) -> "GroupJournal":
        """Return where the pool of one layer group writes."""
        return GroupJournal(self._events, group, block_size)

    def cleared(self) -> None:
        """Note that every index was emptied. What was written before no longer matters."""
        self._events.clear()
        self._events.append(AllCleared())

    def take(self) -> list[BlockEvent]:
        """Return what was written since the last call."""
        taken = self._events.copy()
        self._events.clear()
        return taken


class GroupJournal:
    """The journal as one pool writes it."""

    def __init__(self, events: list[BlockEvent], group: int, block_size: int) -> None:
        self._events = events
        self._group = group
        self._block_size = block_size
        self._tokens = struct.Struct(f"<{block_size}I")
        self._plain_root = root_content(CacheKey(), block_size)

    def stored(self, digest: bytes, content: bytes) -> None:
        """Note a block that became findable. `content` is what its digest is the hash of."""
        before, tokens = content[: -self._tokens.size], content[-self._tokens.size :]
        token_ids = self._tokens.unpack(tokens)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksStored) and last.group == self._group and last.digests[-1] == before:
            last.digests.append(digest)
            last.token_ids += token_ids
            return
        parent: bytes | None = before
        condition = None
        if is_root(before):
            parent, condition = None, None if before == self._plain_root else digest_of(before)
        self._events.append(BlocksStored(self._group, [digest], parent, list(token_ids), self._block_size, condition))

    def removed(self, content: bytes) -> None:
        """Note that the block with this content can no longer be found."""
        digest = digest_of(content)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlocksRemoved) and last.group == self._group:
            last.digests.append(digest)
        else:
            self._events.append(BlocksRemoved(self._group, [digest]))
