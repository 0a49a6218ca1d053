"""Where simulated copies of blocks are kept: in this process, in two bounded tiers, and lost when a fault says so."""

from collections.abc import Iterable

from zif.contract import BlockBytes, BlockLoad, BlockSave, KVStore
from zif.simulation.faults import FaultInjector, FaultPoint


class SimulatedStore(KVStore):
    """Keep copies by handle. Asserts what the control plane owes a store: bounds kept, handles never used twice."""

    def __init__(self, host_bytes: int, disk_bytes: int, faults: FaultInjector) -> None:
        self._bounds = (host_bytes, disk_bytes)
        self._tiers: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self._held = [0, 0]
        self._newest = -1
        self._lost: set[int] = set()
        self._faults = faults
        self.num_saved = 0
        self.num_loaded = 0

    @property
    def handles(self) -> set[int]:
        """The handles under which something is kept."""
        return {*self._tiers[0], *self._tiers[1]}

    def lose(self, handles: Iterable[int]) -> None:
        """Hear that copies were asked for and never made."""
        self._lost.update(handles)

    def save(self, save: BlockSave, data: BlockBytes) -> None:
        assert save.handle > self._newest, f"handle {save.handle} is used twice"
        self._newest = save.handle
        self.num_saved += 1
        self._put(0, save.handle, bytes(data))

    def load(self, load: BlockLoad) -> BlockBytes | None:
        if self._faults.strikes(FaultPoint.TRANSFER):
            self._lost.add(load.handle)
            self.drop(load.handle)
        self.num_loaded += 1
        data = self._tiers[0].get(load.handle) or self._tiers[1].get(load.handle)
        # Rows and steps that were planned before the loss was known may ask for it again.
        known = data is not None or load.handle in self._lost
        assert known, f"handle {load.handle} is to be loaded and nothing is kept under it"
        return data

    def demote(self, handle: int) -> None:
        data = self._tiers[0].pop(handle, None)
        if data is not None:
            self._held[0] -= len(data)
            self._put(1, handle, data)

    def drop(self, handle: int) -> None:
        for tier, copies in enumerate(self._tiers):
            self._held[tier] -= len(copies.pop(handle, b""))

    def close(self) -> None:
        for copies in self._tiers:
            copies.clear()
        self._held = [0, 0]

    def _put(self, tier: int, handle: int, data: bytes) -> None:
        self._tiers[tier][handle] = data
        self._held[tier] += len(data)
        assert self._held[tier] <= self._bounds[tier], f"tier {tier} holds more than its {self._bounds[tier]} bytes"
