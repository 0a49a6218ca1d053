"""A vendor's platform: describes devices, plans workloads, opens devices. Import-light."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from zif.contract.capabilities import Capabilities
from zif.contract.code import CompiledKernel
from zif.contract.device import Device
from zif.contract.plan import Plan, Refusal, Workload


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device as probe saw it. `runtime` are (name, version or value) pairs for people and reports."""

    device_id: str
    name: str
    architecture: str
    memory_bytes: int
    available_bytes: int
    capabilities: Capabilities
    runtime: tuple[tuple[str, str], ...] = ()

    @property
    def simulated(self) -> bool:
        """Say whether the host computes what the hardware would."""
        return self.capabilities.simulated


@dataclass(frozen=True, slots=True)
class Probe:
    """What there is. `reason` says why when `devices` is empty; `steps` lists what was tried, in order.

    `simulation` names environment variables and their values with which a process finds simulated devices instead;
    empty when there are none. Whoever proves a platform may set them before the process starts.
    """

    devices: tuple[DeviceInfo, ...]
    reason: str = ""
    steps: tuple[str, ...] = ()
    simulation: tuple[tuple[str, str], ...] = ()


class Platform(ABC):
    """One vendor's platform. Construction and `probe` import no array library and open no device.

    `preference` orders platforms when the user names none: the highest with a device is taken, and platforms with None
    run only when named.
    """

    name: str
    vendor: str
    preference: int | None = None

    @abstractmethod
    def probe(self) -> Probe:
        """Say which devices there are, or why there are none. Never raises for absent hardware or drivers."""

    @abstractmethod
    def plan(self, workload: Workload) -> Plan | Refusal:
        """Answer what will run, before weights load. Does not mutate anything and opens no device."""

    @abstractmethod
    def open(self, plan: Plan, rank: int) -> Device:
        """Open the plan's device for `rank`. The only call that touches hardware; called in the worker process."""

    def compiled_kernels(self) -> Iterable[CompiledKernel]:
        """Compile the kernels that the platform ships, for shapes that models use, and say what came of each.

        Needs no device and takes minutes. Nothing by default; a platform whose devices claim `static_code` answers with
        some for each architecture that it ships tables for.
        """
        return ()
