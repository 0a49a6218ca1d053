"""AMD GPUs as a platform: which there are, why others are left out, how a workload is planned. No array library.

Devices are `cuda:N`, torch's name for them, too. With `TRITON_INTERPRET=1` there is one device, `interpreter`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zif.accelerator.planned_memory import check_planned_memory
from zif.contract import (
    CompiledKernel,
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
from zif_amd.architectures import ARCHITECTURES, target_name, why_unsupported
from zif_amd.claims import INTERPRETER, Served, gpu_info, interpreter_info
from zif_amd.hardware import Gpu, read_hardware
from zif_amd.notes import plan_notes
from zif_amd.settings import INTERPRET, AmdSettings, num_threads, read_settings
from zif_amd.software import Software
from zif_amd.visibility import visible_gpus

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
    ("communicator", "zif_amd.collectives.RcclGroups"),
    ("graphs", "zif.accelerator.graphs.BucketedGraphs"),
)
_ON_HOST = (
    ("allocator", "zif.host.memory.HostAllocator"),
    ("communicator", "zif.host.gloo.GlooCommunicator"),
    ("graphs", "zif.contract.EagerGraphs"),
)
_SIMULATION = ((INTERPRET, "1"),)
_HINT = f"{INTERPRET}=1 runs the kernels in Triton's interpreter, for tests"


@dataclass(frozen=True, slots=True)
class _Survey:
    """What was found on the way to the GPUs. `reasons` say why there are none, or why some are left out."""

    devices: tuple[DeviceInfo, ...]
    reasons: tuple[str, ...]
    steps: tuple[str, ...]


class AmdPlatform(Platform):
    """AMD GPUs. `root` is where `/proc`, `/sys` and `/dev` are found."""

    name = "amd"
    vendor = "zif"
    preference = 35

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def probe(self) -> Probe:
        settings, software = read_settings(), Software.read()
        problems = software.problems()
        if settings.interpreted:
            steps = (*software.steps(), f"{INTERPRET} is set: the kernels are interpreted, and no GPU is looked for")
            if problems:
                return Probe((), "; ".join(problems), steps)
            return Probe((interpreter_info(read_host(self._root), software),), steps=steps)
        survey = self._survey(settings, software)
        if problems:
            return Probe((), "; ".join((*survey.reasons, *problems)), survey.steps)
        if not survey.devices:
            return Probe((), "; ".join((*survey.reasons, _HINT)), survey.steps, _SIMULATION)
        return Probe(survey.devices, steps=survey.steps)

    def plan(self, workload: Workload) -> Plan | Refusal:
        probe = self.probe()
        if not probe.devices:
            return Refusal(self.name, (probe.reason,))
        device = probe.devices[0]
        offer = Offer(
            platform=self.name,
            device=device,
            layout_of=kv_layout,
            implementations=tuple(sorted((*_PORTABLE, *(_ON_HOST if device.simulated else _ON_GPU)))),
            emulated=_EMULATED,
            notes=tuple(plan_notes(workload, device)),
            sizing=KVSizing(max_share=0.5 if device.simulated else 0.9),
        )
        return negotiate(workload, offer)

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
        from zif_amd.device import open_gpu, open_interpreter

        if plan.device_id == INTERPRETER:
            return open_interpreter(plan, rank, num_threads() or read_host(self._root).num_cores)
        from_there_on = probe.devices[ids.index(plan.device_id) :]
        if rank >= len(from_there_on):
            raise PlatformUnavailableError(
                f"rank {rank!r} needs a GPU of its own, and there are {len(from_there_on)} from {plan.device_id!r} on; "
                "start fewer ranks, or make more GPUs visible"
            )
        check_planned_memory(plan, from_there_on[rank])
        return open_gpu(plan, rank, from_there_on[rank])

    def compiled_kernels(self) -> Iterable[CompiledKernel]:
        from zif_amd.inspection import compiled_kernels

        return compiled_kernels()

    def _survey(self, settings: AmdSettings, software: Software) -> _Survey:
        hardware = read_hardware(self._root)
        visible = visible_gpus(hardware.gpus, settings.filters)
        steps = (*software.steps(), *hardware.steps, *visible.steps)
        reason = hardware.problem or visible.problem or settings.problem or software.build_problem(hardware)
        if reason:
            return _Survey((), (reason,), steps)
        served, reasons = [], []
        for index, gpu in enumerate(visible.gpus):
            architecture = _assumed(gpu, settings)
            if reason := why_unsupported(architecture) or software.architecture_problem(ARCHITECTURES[architecture]):
                reasons.append(f"cuda:{index}: {reason}")
            else:
                served.append(Served(index, gpu, ARCHITECTURES[architecture]))
        devices = tuple(gpu_info(one, software, hardware, len(served)) for one in served)
        return _Survey(devices, tuple(reasons), (*steps, *(f"left out: {reason}" for reason in reasons)))


def _assumed(gpu: Gpu, settings: AmdSettings) -> str:
    """Return the architecture for which the runtime takes a GPU."""
    return target_name(gpu.target_version if settings.target_version is None else settings.target_version)
