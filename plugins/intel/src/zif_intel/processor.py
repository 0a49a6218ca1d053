"""The opened host: cores, IPEX where it serves, oneCCL where it is installed."""

import contextlib
import os
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from zif.contract import AttentionBackend, Communicator, CommunicatorGroup, OpTable, Plan
from zif.errors import PlatformUnavailableError
from zif.host.device import HostDevice
from zif_intel.collectives import host_communicator

AnyAttention = AttentionBackend[Any, Any]


@dataclass(frozen=True, slots=True)
class Cores:
    """Where to compute: on how many threads, and on which processors, None for those that the process has."""

    num_threads: int
    processors: frozenset[int] | None = None


class Processor(HostDevice):
    """One process's share of the host. Binds the process to the cores it is given, until `close`."""

    def __init__(
        self, plan: Plan, rank: int, cores: Cores, attention: AnyAttention | None = None, ops: OpTable | None = None
    ) -> None:
        self._previous: set[int] | None = None
        num_threads = cores.num_threads
        if cores.processors is not None:
            allowed = os.sched_getaffinity(0)
            chosen = cores.processors & allowed
            if not chosen:
                raise PlatformUnavailableError(
                    f"none of the node's processors {sorted(cores.processors)} is among those that this process may "
                    f"use, {sorted(allowed)}; choose another NUMA node"
                )
            num_threads = min(num_threads, len(chosen))
            self._previous = allowed
            _bind(chosen)
        try:
            super().__init__(plan, rank, num_threads, attention, ops)
        except BaseException:
            self._unbind()
            raise

    def communicator(self, group: CommunicatorGroup) -> Communicator:
        communicator = host_communicator(group)
        self._communicators.append(communicator)
        return communicator

    def close(self) -> None:
        super().close()
        self._unbind()

    def _unbind(self) -> None:
        if self._previous is not None:
            _bind(self._previous)
            self._previous = None


def _bind(processors: AbstractSet[int]) -> None:
    """Bind every thread of the process, those of the thread pools that there are already included."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), processors)


def open_processor(plan: Plan, rank: int, cores: Cores, *, uses_ipex: bool) -> Processor:
    """Open the host; with IPEX its kernels serve attention and norms."""
    if not uses_ipex:
        return Processor(plan, rank, cores)
    import intel_extension_for_pytorch  # noqa: F401 - registers the kernels

    from zif_intel.ipex_attention import IpexAttention
    from zif_intel.ipex_ops import IpexOps

    return Processor(plan, rank, cores, IpexAttention(), IpexOps())
