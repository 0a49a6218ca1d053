"""Engines of integers with tiers of KV below the device, and a remote that fails when told to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.control_plane import Engine
from zif.contract import KVArena, RemoteTier, TokenUpdate
from zif.kv import PagedBlockManager, TierSetup
from zif.kv.stores import DiskStore, EntryFormat, HostStore, RemoteStore, TieredStore
from zif.scheduling import TokenBudgetScheduler

FINGERPRINT = bytes(range(32))


class FlakyRemote(RemoteTier):
    """A dictionary that raises while `fails`."""

    def __init__(self) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.fails = False
        self.num_calls = 0

    def contains(self, names: Sequence[bytes], timeout_s: float) -> Sequence[bool]:
        self._call()
        return [name in self.entries for name in names]

    def put(self, name: bytes, data: bytes, timeout_s: float) -> None:
        self._call()
        self.entries[name] = data

    def get(self, name: bytes, timeout_s: float) -> bytes | None:
        self._call()
        return self.entries.get(name)

    def _call(self) -> None:
        self.num_calls += 1
        if self.fails:
            raise TimeoutError("the remote does not answer")


def formats_of(arena: KVArena, fingerprint: bytes = FINGERPRINT) -> list[EntryFormat]:
    return [EntryFormat(fingerprint, index, group.layout) for index, group in enumerate(arena.groups)]


@dataclass
class TieredEngine(Engine):
    """`Engine` with tiers. `setup` are further fields of `TierSetup`; copying is taken to be fast by default."""

    host_bytes: int = 0
    disk_bytes: int = 0
    folder: Path | None = None
    remote: RemoteTier | None = None
    setup: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        formats = formats_of(self.arena)
        self.host = HostStore(self.host_bytes) if self.host_bytes else None
        self.disk = DiskStore(self.folder, self.disk_bytes, formats) if self.folder else None
        shared = RemoteStore(self.remote, formats, lambda: self.now_s) if self.remote else None
        self.store = TieredStore(self.host, self.disk, shared)
        setup = TierSetup(
            self.host_bytes,
            self.disk_bytes,
            tuple(form.num_bytes for form in formats),
            tuple(self.store.kept()),
            shared,
            **self.setup,
        )
        self.blocks = PagedBlockManager(
            self.arena, enable_prefix_caching=self.caching, max_step_tokens=self.budget, tiers=setup
        )
        self.scheduler = TokenBudgetScheduler(self.config, self.blocks, self.constraints, lambda: self.now_s)
        assert self.runner.attach_store(self.store)

    def step(self, faults: dict[int, str] | None = None) -> list[TokenUpdate]:
        updates = super().step(faults)
        if self.host is not None:
            assert self.host.num_bytes <= self.host_bytes
        return updates
