"""AMD GPUs as a platform: which there are, why others are left out, what a plan says of them. No array library.

Devices are `cuda:N`, torch's name for them, too. With `TRITON_INTERPRET=1` there is one device, `interpreter`.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zif.accelerator.gpu.claims import ServedGpu
from zif.accelerator.gpu.platform import GpuPlatform, LeftOut, Survey
from zif.accelerator.gpu.software import GpuSoftware
from zif.contract import CompiledKernel, DeviceInfo, Workload
from zif_amd.architectures import ARCHITECTURES, target_name, why_unsupported
from zif_amd.claims import served_gpu
from zif_amd.hardware import Gpu, Hardware, read_hardware
from zif_amd.notes import plan_notes
from zif_amd.settings import AmdSettings, read_settings
from zif_amd.software import architecture_problem, build_problem, read_software
from zif_amd.visibility import visible_gpus

if TYPE_CHECKING:
    from zif.accelerator.gpu.device import GpuParts


class AmdPlatform(GpuPlatform):
    """AMD GPUs. `/dev` is under the root, too."""

    name = "amd"
    vendor = "zif"
    preference = 35
    device_kind = "cuda"
    communicator = "zif_amd.collectives.RcclGroups"

    def compiled_kernels(self) -> Iterable[CompiledKernel]:
        from zif_amd.inspection import compiled_kernels

        return compiled_kernels()

    def _software(self) -> GpuSoftware:
        return read_software()

    def _survey(self, software: GpuSoftware) -> Survey:
        settings, hardware = read_settings(), read_hardware(self._root)
        visible = visible_gpus(hardware.gpus, settings.filters)
        steps = (*hardware.steps, *visible.steps)
        problem = hardware.problem or visible.problem or settings.problem or build_problem(software, hardware)
        if problem:
            return Survey(steps, problem=problem)
        named = [(gpu, _assumed(gpu, settings)) for gpu in visible.gpus]
        return Survey(steps, tuple(_judged(gpu, name, software, hardware) for gpu, name in named))

    def _notes(self, workload: Workload, device: DeviceInfo) -> Iterable[str]:
        return plan_notes(workload, device)

    def _parts(self) -> "GpuParts":
        from zif_amd.device import PARTS

        return PARTS


def _assumed(gpu: Gpu, settings: AmdSettings) -> str:
    """Return the architecture for which the runtime takes a GPU."""
    return target_name(gpu.target_version if settings.target_version is None else settings.target_version)


def _judged(gpu: Gpu, name: str, software: GpuSoftware, hardware: Hardware) -> ServedGpu | LeftOut:
    """Describe a GPU that the runtime takes for an architecture, or say why it is left out."""
    if reason := why_unsupported(name) or architecture_problem(software, ARCHITECTURES[name]):
        return LeftOut(reason)
    return served_gpu(gpu, ARCHITECTURES[name], hardware)
