"""Where copies of blocks are outside of the device: host memory over disk over remote, each bounded, each in LRU order.

    device  --evicted-->  host  --least recently used-->  disk  --least recently used-->  remote, or gone

This is the control plane's half: names, bytes and decisions. Every decision is a transfer that the next plan carries;
the bytes are moved by a runner between its arena and a `KVStore`. A copy is in one tier at a time and stays there when
it is loaded; blocks that the device evicts again are then known already and cost no second copy.

Named copies are found by (group, digest). Private ones belong to one swapped-out request and are never evicted. A copy
that the next plan loads is *pinned*: it stays where it is until then. `manager.py` and `swap.py` are the only callers.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from zif.contract import BlockLoad, BlockSave, KeptBlock, Transfers
from zif.kv.pending import PendingTransfers

DEVICE: Final = "device"
HOST: Final = "host"
DISK: Final = "disk"
REMOTE: Final = "remote"


class RemoteLookup(Protocol):
    """Says what a remote tier has."""

    def contains(self, group: int, names: Sequence[bytes]) -> Sequence[bool]:
        """Say for each block of a group whether it can be had."""
        ...


@dataclass(frozen=True, slots=True)
class TierSetup:
    """Which tiers there are. 0 bytes: there is none.

    `disk_entry_bytes` is what a block of each group takes on disk, header included; `kept` is what an earlier process
    left there. A preempted request is copied out, if it fits, when

        2 * bytes / host_bytes_per_s  <  tokens to compute again / prefill_tokens_per_s

    where the tokens are those computed so far that the device's prefix index would not find again.
    """

    host_bytes: int = 0
    disk_bytes: int = 0
    disk_entry_bytes: tuple[int, ...] = ()
    kept: tuple[KeptBlock, ...] = ()
    remote: RemoteLookup | None = None
    host_bytes_per_s: int = 8_000_000_000
    prefill_tokens_per_s: int = 2000


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy and where it is. `tier` is None for one that only the remote tier has."""

    handle: int
    group: int
    name: bytes
    tier: "_Tier | None"
    num_pins: int = 0
    unwanted: bool = False


class _Tier:
    """One bounded tier. `evictable` are the copies that somebody might find, least recently used first."""

    def __init__(self, name: str, max_bytes: int, block_bytes: Sequence[int]) -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.block_bytes = block_bytes
        self.num_bytes = 0
        self.num_evictable_bytes = 0
        self.evictable: dict[int, _Copy] = {}

    def add(self, copy: _Copy) -> None:
        """Take in a copy, as the most recently used one."""
        self.num_bytes += self.block_bytes[copy.group]
        if copy.name and not copy.unwanted:
            self.evictable[copy.handle] = copy
            self.num_evictable_bytes += self.block_bytes[copy.group]

    def hold(self, copy: _Copy) -> None:
        """Let a copy not be evicted any more."""
        if self.evictable.pop(copy.handle, None):
            self.num_evictable_bytes -= self.block_bytes[copy.group]

    def remove(self, copy: _Copy) -> None:
        """Let a copy go."""
        self.hold(copy)
        self.num_bytes -= self.block_bytes[copy.group]

    def touch(self, copy: _Copy) -> None:
        """Note that a copy was used."""
        if self.evictable.pop(copy.handle, None):
            self.evictable[copy.handle] = copy

    def victim(self) -> _Copy | None:
        """Return the copy to evict first."""
        return next((copy for copy in self.evictable.values() if not copy.num_pins), None)


class TierIndex:
    """Find copies, make room for them, and collect the transfers that follow."""

    def __init__(self, setup: TierSetup, block_bytes: Sequence[int]) -> None:
        disk = _Tier(DISK, setup.disk_bytes, setup.disk_entry_bytes or block_bytes)
        self._tiers = [tier for tier in (_Tier(HOST, setup.host_bytes, block_bytes), disk) if tier.max_bytes]
        self._remote = setup.remote
        self._copies: dict[int, _Copy] = {}
        self._by_name: dict[tuple[int, bytes], _Copy] = {}
        self._num_handles = max((kept.handle for kept in setup.kept), default=0)
        self._pending = PendingTransfers()
        for kept in setup.kept:
            self._add(_Copy(kept.handle, kept.group, kept.name, disk))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tiers, the device's included, from fast to slow."""
        return (DEVICE, *(tier.name for tier in self._tiers), *([REMOTE] if self._remote else []))

    @property
    def has_remote(self) -> bool:
        """Say whether there is a remote tier to ask."""
        return self._remote is not None

    def tier_of(self, group: int, name: bytes) -> str | None:
        """Return the name of the local tier that has a copy of a block."""
        copy = self._by_name.get((group, name))
        return copy.tier.name if copy and copy.tier else None

    def in_remote(self, group: int, names: Sequence[bytes]) -> Sequence[bool]:
        """Say for each block whether the remote tier has it."""
        return self._remote.contains(group, names) if self._remote else [False] * len(names)

    def keep(self, group: int, block: int, name: bytes) -> None:
        """Copy a block that the device evicts, unless there is a copy or no room."""
        copy = self._by_name.get((group, name))
        if copy is not None and copy.tier is not None:
            copy.tier.touch(copy)
        elif copy is None and self._make_room(0, group):
            self._save(group, block, name)

    def keep_private(self, blocks: Sequence[tuple[int, int]]) -> list[int] | None:
        """Copy (group, block) pairs for one request. Returns the handles; None, and no copy, without room for all."""
        if not self._tiers or self._tiers[0].name != HOST:
            return None
        host, handles = self._tiers[0], list[int]()
        wanted = sum(host.block_bytes[group] for group, _ in blocks)
        if host.num_bytes - host.num_evictable_bytes + wanted > host.max_bytes:
            return None
        for group, block in blocks:
            if not self._make_room(0, group):
                self.discard(handles)
                return None
            handles.append(self._save(group, block, b""))
        return handles

    def num_bytes(self, blocks: Iterable[tuple[int, int]]) -> int:
        """Add up the bytes of (group, block) pairs in the first tier."""
        return sum(self._tiers[0].block_bytes[group] for group, _ in blocks)

    def pin(self, group: int, name: bytes) -> int:
        """Hold on to a named copy that will be loaded, whatever room is made meanwhile; return its handle."""
        copy = self._by_name.get((group, name))
        if copy is None:
            self._num_handles += 1
            copy = _Copy(self._num_handles, group, name, None)
            self._add(copy)
        self.pin_handle(copy.handle)
        return copy.handle

    def pin_handle(self, handle: int) -> None:
        """Hold on to a copy by its handle."""
        copy = self._copies[handle]
        copy.num_pins += 1
        if copy.tier is not None:
            copy.tier.touch(copy)

    def unpin(self, handle: int) -> None:
        """Let go of a copy. The last to do so lets it be forgotten, if that was asked for meanwhile."""
        copy = self._copies[handle]
        copy.num_pins -= 1
        if not copy.num_pins and (copy.unwanted or copy.tier is None):
            self._drop(copy)

    def load(self, handle: int, block: int) -> None:
        """Fill a block from a pinned copy. The pin ends when the transfers are taken, or with `withdraw_load`."""
        copy = self._copies[handle]
        assert copy.num_pins, f"handle {handle} is loaded and not pinned"
        assert (copy.group, block) not in self._pending.loads, f"block {block} of group {copy.group} is loaded twice"
        self._pending.loads[copy.group, block] = BlockLoad(copy.group, block, handle, copy.name)

    def withdraw_load(self, group: int, block: int) -> None:
        """Do not fill a block after all."""
        self.unpin(self._pending.loads.pop((group, block)).handle)

    def discard(self, handles: Iterable[int]) -> None:
        """Forget copies; those that are pinned, when they have been loaded."""
        for handle in handles:
            copy = self._copies[handle]
            if not copy.num_pins:
                self._drop(copy)
            elif not copy.unwanted:
                copy.unwanted = True
                self._by_name.pop((copy.group, copy.name), None)
                if copy.tier is not None:
                    copy.tier.hold(copy)

    def forget(self, group: int, name: bytes) -> None:
        """Forget the copy of a block by its name, if there is one; a remote tier keeps its own."""
        copy = self._by_name.get((group, name))
        if copy is not None:
            self.discard([copy.handle])

    def discard_named(self) -> None:
        """Forget every copy that may be found by name."""
        self.discard([copy.handle for copy in self._by_name.values()])

    def forget_lost(self, handle: int) -> None:
        """Hear that a store has lost a copy, which may be forgotten by now."""
        copy = self._copies.get(handle)
        if copy is not None and not copy.num_pins:
            self._remove(copy)

    def take(self) -> Transfers | None:
        """Return the transfers for the next plan. What is then in the store is as this index has it."""
        if self._pending.is_empty:
            return None
        pending, self._pending = self._pending, PendingTransfers()
        for load in pending.loads.values():
            self.unpin(load.handle)
        return pending.transfers()

    def check_integrity(self, private: set[int], hands: Sequence[set[int]]) -> None:
        """Assert that bytes add up, that private copies are those of `private`, and that loads fill blocks in hand.

        `hands` are the blocks of each group that live requests hold.
        """
        for tier in self._tiers:
            copies = [copy for copy in self._copies.values() if copy.tier is tier]
            assert tier.num_bytes == sum(tier.block_bytes[copy.group] for copy in copies), f"{tier.name}: bytes drifted"
            assert tier.num_bytes <= tier.max_bytes, f"{tier.name}: {tier.num_bytes} bytes of {tier.max_bytes}"
            evictable = {copy.handle for copy in copies if copy.name and not copy.unwanted}
            assert evictable == set(tier.evictable), f"{tier.name}: the order of eviction misses a copy"
        named = {copy.handle for copy in self._copies.values() if copy.name and not copy.unwanted}
        assert named == {copy.handle for copy in self._by_name.values()}, "a copy cannot be found, or is gone"
        kept = {copy.handle for copy in self._copies.values() if not copy.name and not copy.unwanted}
        assert kept == private, "private copies are not those of the suspended requests"
        loads = self._pending.loads.values()
        pins = Counter(load.handle for load in loads)
        assert pins == Counter({c.handle: c.num_pins for c in self._copies.values() if c.num_pins}), "pins drifted"
        assert set(self._pending.saves) <= set(self._copies), "a pending save is of no copy"
        assert all(load.block_id in hands[load.group] for load in loads), "a block is to be filled that nobody holds"

    def _save(self, group: int, block: int, name: bytes) -> int:
        self._num_handles += 1
        copy = _Copy(self._num_handles, group, name, self._tiers[0])
        self._add(copy)
        self._pending.saves[copy.handle] = BlockSave(group, block, copy.handle, name)
        return copy.handle

    def _make_room(self, level: int, group: int) -> bool:
        """Make room for a block in a tier, at the cost of what was used least recently."""
        if level >= len(self._tiers):
            return False
        tier = self._tiers[level]
        max_bytes = tier.max_bytes - tier.block_bytes[group]
        while tier.num_bytes > max_bytes:
            victim = tier.victim() if max_bytes >= 0 else None
            if victim is None:
                return False
            self._push_down(victim, level)
        return True

    def _push_down(self, copy: _Copy, level: int) -> None:
        """Move a copy from one tier to the next below, if there is one with room, else forget it."""
        if copy.handle in self._pending.saves:
            self._drop(copy)  # It has not been made, and will not be.
        elif self._make_room(level + 1, copy.group):
            tier = self._tiers[level]
            tier.remove(copy)
            copy.tier = self._tiers[level + 1]
            copy.tier.add(copy)
            self._pending.demote(copy.handle)
        elif self._remote is not None and level + 1 == len(self._tiers):
            self._remove(copy)
            self._pending.demote(copy.handle)
        else:
            self._drop(copy)

    def _add(self, copy: _Copy) -> None:
        self._copies[copy.handle] = copy
        if copy.name:
            self._by_name[copy.group, copy.name] = copy
        if copy.tier is not None:
            copy.tier.add(copy)

    def _drop(self, copy: _Copy) -> None:
        self._remove(copy)
        if copy.tier is not None:
            self._pending.drop(copy.handle)

    def _remove(self, copy: _Copy) -> None:
        del self._copies[copy.handle]
        if not copy.unwanted:
            self._by_name.pop((copy.group, copy.name), None)
        if copy.tier is not None:
            copy.tier.remove(copy)
