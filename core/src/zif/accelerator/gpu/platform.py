"""GPUs of one vendor as a platform: how they are offered, how a workload is planned, what is opened. No array library.

What there is, and why some of it is left out, is the vendor's to say, in the hooks of `GpuPlatform`.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zif.accelerator.gpu.claims import INTERPRETER, ServedGpu, gpu_info, interpreter_info
from zif.accelerator.gpu.settings import INTERPRET, is_interpreted, num_threads
from zif.accelerator.gpu.software import GpuSoftware
from zif.accelerator.planned_memory import check_planned_memory
from zif.contract import (
    Device,
    DeviceInfo,
    Feature,
    KVSizing,
    Offer,
    Plan,
    Platform,
    Probe,
    Refusal,
    Workload,
    negotiate,
)
from zif.errors import PlatformUnavailableError
from zif.host.facts import read_host
from zif.host.layout import kv_layout

if TYPE_CHECKING:
    from zif.accelerator.gpu.device import GpuParts

_EMULATED = (
    (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, "weights are held in the model's dtype: about four times the bytes"),
)
_PORTABLE = (
    ("attention", "zif.kernels.attention.PagedAttention"),
    ("moe", "zif.kernels.ops.KernelOps"),
    ("ops", "zif.kernels.ops.KernelOps"),
    ("runner", "core"),
    ("state", "zif.reference.state"),
)
_ON_GPU = (
    ("allocator", "zif.accelerator.memory.AcceleratorAllocator"),
    ("graphs", "zif.accelerator.graphs.BucketedGraphs"),
)
_ON_HOST = (
    ("allocator", "zif.host.memory.HostAllocator"),
    ("communicator", "zif.host.gloo.GlooCommunicator"),
    ("graphs", "zif.contract.EagerGraphs"),
)
_SIMULATION = ((INTERPRET, "1"),)
_HINT = f"{INTERPRET}=1 runs the kernels in Triton's interpreter, for tests"
_SIMULATED_NOTE = "kernels run in Triton's interpreter on the host: for proofs, not for use"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A GPU that torch counts and the platform does not serve: why, with the next step."""

    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What a vendor found. `gpus` are in the order in which torch counts them; `problem` says why none can be used."""

    steps: tuple[str, ...]
    gpus: tuple[ServedGpu | LeftOut, ...] = ()
    problem: str = ""


class GpuPlatform(Platform):
    """GPUs of one vendor under zif's kernels; where Triton interprets, one device on the host in their place.

    Vendors set `device_kind`, torch's name for their devices, and `communicator`, the class that their ranks meet by,
    and fill in the hooks, of which only `_parts` imports an array library. `root` is where `/proc` and `/sys` are.
    """

    device_kind: str
    communicator: str

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    @abstractmethod
    def _software(self) -> GpuSoftware:
        """Read which software is installed."""

    @abstractmethod
    def _survey(self, software: GpuSoftware) -> Survey:
        """Look for GPUs that this software can use. Raises nothing for absent hardware, and opens none."""

    @abstractmethod
    def _notes(self, workload: Workload, device: DeviceInfo) -> Iterable[str]:
        """Say what a user should know of a plan for a GPU before the weights load."""

    @abstractmethod
    def _parts(self) -> "GpuParts":
        """Return what opening a GPU takes of the vendor."""

    def _advice(self, workload: Workload, device: DeviceInfo) -> Iterable[str]:
        """Say what a user can do who is refused, where the reasons of the negotiation do not. Nothing by default."""
        return ()

    def probe(self) -> Probe:
        software = self._software()
        problems = software.problems()
        if is_interpreted():
            steps = (*software.steps(), f"{INTERPRET} is set: the kernels are interpreted, and no GPU is looked for")
            if problems:
                return Probe((), "; ".join(problems), steps)
            return Probe((interpreter_info(read_host(self._root), software),), steps=steps)
        survey = self._survey(software)
        left_out = tuple(f"{name}: {gpu.reason}" for name, gpu in self._named(survey) if isinstance(gpu, LeftOut))
        steps = (*software.steps(), *survey.steps, *(f"left out: {reason}" for reason in left_out))
        reasons = (survey.problem,) if survey.problem else left_out
        if problems:
            return Probe((), "; ".join((*reasons, *problems)), steps)
        if devices := self._devices(survey, software):
            return Probe(devices, steps=steps)
        return Probe((), "; ".join((*reasons, _HINT)), steps, _SIMULATION)

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        device = probe.devices[0]
        of_place = _ON_HOST if device.simulated else (*_ON_GPU, ("communicator", self.communicator))
        offer = Offer(
            platform=self.name,
            device=device,
            layout_of=kv_layout,
            implementations=tuple(sorted((*_PORTABLE, *of_place))),
            emulated=_EMULATED,
            notes=(_SIMULATED_NOTE,) if device.simulated else tuple(self._notes(workload, device)),
            sizing=KVSizing(max_share=0.5 if device.simulated else 0.9),
        )
        answer = negotiate(workload, offer)
        if isinstance(answer, Refusal):
            return Refusal(self.name, (*self._advice(workload, device), *answer.reasons))
        return answer

    def open(self, plan: Plan, rank: int) -> Device:
        """Open the plan's device, or for ranks above 0 the one that many places behind it: a GPU serves one rank."""
        if rank < 0:
            raise PlatformUnavailableError(f"rank {rank!r} does not exist; ranks are counted from 0")
        probe = self.probe()
        if not probe.devices:
            raise PlatformUnavailableError(probe.reason)
        ids = [device.device_id for device in probe.devices]
        if plan.device_id not in ids:
            found = ", ".join(ids)
            raise PlatformUnavailableError(
                f"the plan is for {plan.device_id!r}, this process finds {found}; plan again"
            )
        from zif.accelerator.gpu.device import open_gpu, open_interpreter

        if plan.device_id == INTERPRETER:
            return open_interpreter(plan, rank, num_threads() or read_host(self._root).num_cores)
        from_there_on = probe.devices[ids.index(plan.device_id) :]
        if rank >= len(from_there_on):
            raise PlatformUnavailableError(
                f"rank {rank!r} needs a GPU of its own, and there are {len(from_there_on)} from {plan.device_id!r} on; "
                "start fewer ranks, or make more GPUs visible"
            )
        check_planned_memory(plan, from_there_on[rank])
        return open_gpu(plan, rank, from_there_on[rank], self._parts())

    def _named(self, survey: Survey) -> list[tuple[str, ServedGpu | LeftOut]]:
        """Give every GPU torch's name for it: what is left out keeps its number."""
        return [(f"{self.device_kind}:{index}", gpu) for index, gpu in enumerate(survey.gpus)]

    def _devices(self, survey: Survey, software: GpuSoftware) -> tuple[DeviceInfo, ...]:
        """Describe the GPUs that are served. Ranks need one each, so one alone claims no collectives."""
        served = [(name, gpu) for name, gpu in self._named(survey) if isinstance(gpu, ServedGpu)]
        return tuple(gpu_info(name, gpu, software, collectives=len(served) > 1) for name, gpu in served)
