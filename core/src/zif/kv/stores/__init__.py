"""Where copies of KV blocks are kept: host memory, disk, remote. Bytes only; `zif.kv.tiers` decides what goes where."""

from zif.kv.stores.disk import DiskStore
from zif.kv.stores.entries import EntryFormat
from zif.kv.stores.memory import HostStore
from zif.kv.stores.remote import RemoteStore
from zif.kv.stores.tiered import TieredStore

__all__ = ["DiskStore", "EntryFormat", "HostStore", "RemoteStore", "TieredStore"]
