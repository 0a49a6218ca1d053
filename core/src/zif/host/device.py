"""A device whose memory is the host's and whose computation is synchronous: the services of one worker process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
from zif.host.attention import TiledAttention
from zif.host.gloo import GlooCommunicator
from zif.host.health import check_health
from zif.host.memory import HostAllocator
from zif.reference.ops import ReferenceOps


class HostDevice(Device):
    """One process's share of the host. Attention and operators are the portable ones, unless given.

    Without `graphs` functions run as they are.

    Sets torch's thread count, which is the process's, and puts it back at `close`.
    """

    array_device = "cpu"

    def __init__(
        self,
        plan: Plan,
        rank: int,
        num_threads: int,
        attention: AttentionBackend[Any, Any] | None = None,
        ops: OpTable | None = None,
        graphs: GraphRunner | None = None,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.allocator = HostAllocator(plan.memory.available_bytes)
        self.attention = attention or TiledAttention()
        self.ops = ops or ReferenceOps()
        self.graphs = graphs or EagerGraphs()
        self._communicators: list[Communicator] = []
        self._closed = False
        self._previous_threads = torch.get_num_threads()
        torch.set_num_threads(num_threads)

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        communicator = GlooCommunicator(group)
        self._communicators.append(communicator)
        return communicator

    def synchronize(self) -> None:
        """Return at once: every call of torch on a CPU has run when it returns."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Give torch its threads back at the end: graphs may leave it one."""
        num_threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)

    def health(self, deadline_s: float) -> Health:
        if self._closed:
            return Health(False, "the device is closed")
        return check_health(self.array_device, deadline_s)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for communicator in self._communicators:
            communicator.close()
        for tag, _ in self.allocator.stats().by_tag:
            self.allocator.free_tag(tag)
        torch.set_num_threads(self._previous_threads)
