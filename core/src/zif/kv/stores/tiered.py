"""The store of one engine: host memory over disk over remote, as far as each is there.

It does what it is told by handle and keeps no books of what is wanted: that is `zif.kv.tiers`. Only at the end, when
there is nobody left to ask, it moves what host memory holds to the disk.
"""

from collections.abc import Sequence

from zif.contract import BlockBytes, BlockLoad, BlockSave, KeptBlock, KVStore
from zif.kv.stores.disk import DiskStore
from zif.kv.stores.memory import HeldBlock, HostStore
from zif.kv.stores.remote import RemoteStore


class TieredStore(KVStore):
    """Keep blocks in up to three tiers. Saves go to the first one there is."""

    def __init__(
        self, host: HostStore | None = None, disk: DiskStore | None = None, remote: RemoteStore | None = None
    ) -> None:
        self._host = host
        self._disk = disk
        self._remote = remote

    def kept(self) -> Sequence[KeptBlock]:
        return self._disk.kept() if self._disk is not None else ()

    def save(self, save: BlockSave, data: BlockBytes) -> None:
        if self._host is not None:
            self._host.put(save.handle, save.group, save.name, data)
        else:
            self._put_below_host(save.handle, HeldBlock(save.group, save.name, bytes(data)))

    def load(self, load: BlockLoad) -> BlockBytes | None:
        if self._host is not None and load.handle in self._host:
            return self._host.get(load.handle)
        if self._disk is not None and load.handle in self._disk:
            return self._disk.get(load.handle)
        return self._remote.get(load.group, load.name) if self._remote is not None and load.name else None

    def demote(self, handle: int) -> None:
        if self._host is not None and (block := self._host.pop(handle)):
            self._put_below_host(handle, block)
        elif self._disk is not None and (block := self._disk.pop(handle)) and self._remote is not None:
            self._remote.put(block.group, block.name, block.data)

    def drop(self, handle: int) -> None:
        if self._host is not None:
            self._host.pop(handle)
        if self._disk is not None:
            self._disk.drop(handle)

    def close(self) -> None:
        """Give memory back. What it holds goes to the disk, in place of what was used less recently."""
        blocks = self._host.pop_all() if self._host is not None else {}
        if self._disk is not None:
            self._disk.put_newest({handle: block for handle, block in blocks.items() if block.name})

    def _put_below_host(self, handle: int, block: HeldBlock) -> None:
        if self._disk is not None:
            self._disk.put(handle, block.group, block.name, block.data)
        elif self._remote is not None:
            self._remote.put(block.group, block.name, block.data)
