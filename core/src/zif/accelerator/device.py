"""A device with memory of its own that torch drives: the services of one worker process."""

import contextlib
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from zif.accelerator.faults import device_faults
from zif.accelerator.graphs import BucketedGraphs
from zif.accelerator.memory import AcceleratorAllocator, empty_caches
from zif.contract import (
    AttentionBackend,
    Communicator,
    CommunicatorGroup,
    Device,
    EagerGraphs,
    GraphRunner,
    Health,
    OpTable,
    Plan,
)
from zif.errors import DeviceLostError
from zif.host.gloo import GlooCommunicator, MakeGroup
from zif.host.health import check_health


@dataclass(frozen=True, slots=True)
class Services:
    """What a vendor brings. `make_group` makes torch's process group; `graphs` None runs functions as they are."""

    attention: AttentionBackend[Any, Any]
    ops: OpTable
    make_group: MakeGroup
    graphs: GraphRunner | None = None


class AcceleratorDevice(Device):
    """The device that the plan names, in one process.

    Makes it the process's current device for torch, and gives the place back to the previous one at `close`.
    """

    allocator: AcceleratorAllocator
    compiles_on_first_use = True

    def __init__(self, plan: Plan, rank: int, services: Services) -> None:
        self.plan = plan
        self.rank = rank
        self.array_device = plan.device_id
        self._previous = _make_current(self.array_device)
        self.allocator = AcceleratorAllocator(plan.memory.available_bytes, self.array_device)
        self.attention = services.attention
        self.ops = services.ops
        self.graphs = services.graphs or EagerGraphs()
        self._make_group = services.make_group
        self._communicators: list[Communicator] = []
        self._closed = False

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        communicator = GlooCommunicator(group, self._make_group)
        self._communicators.append(communicator)
        return communicator

    def synchronize(self) -> None:
        with device_faults(self.array_device):
            _synchronize(self.array_device)

    def watch(self) -> AbstractContextManager[None]:
        return device_faults(self.array_device)

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, "the device is closed")
        return check_health(self.array_device, deadline_s)

    def sleep(self, tags_kept_on_host: Collection[str] = ()) -> None:
        """Give the device's memory back; what that means for tensors is in `AcceleratorAllocator.sleep`.

        Captured graphs are forgotten: they hold addresses.
        """
        self.synchronize()
        if isinstance(self.graphs, BucketedGraphs):
            self.graphs.forget()
        self.allocator.sleep(tags_kept_on_host)

    def wake(self) -> None:
        """Take memory again. Raises as `AcceleratorAllocator.wake`."""
        self.allocator.wake()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for communicator in self._communicators:
            communicator.close()
        if isinstance(self.graphs, BucketedGraphs):
            self.graphs.forget()
        # A lost device has nothing left that could be given back.
        with contextlib.suppress(DeviceLostError), device_faults(self.array_device):
            for tag, _ in self.allocator.stats().by_tag:
                self.allocator.free_tag(tag)
            empty_caches(self.array_device)
            _make_current(self._previous)


def _make_current(array_device: str) -> str:
    """Make a device torch's current one of its kind. Returns the one that was, "" where torch knows none."""
    if not array_device or torch.device(array_device).type == "cpu":
        return ""
    module = torch.get_device_module(array_device)
    kind = torch.device(array_device).type
    previous = f"{kind}:{module.current_device()}"
    with device_faults(array_device):
        module.set_device(array_device)
    return previous


def _synchronize(array_device: str) -> None:
    """Wait for everything submitted. On a device in host memory everything has run."""
    if torch.device(array_device).type != "cpu":
        torch.get_device_module(array_device).synchronize(array_device)
