"""NVIDIA GPUs as a platform: which there are, why others are left out, what a plan says of them. No array library.

Devices are `cuda:N`, torch's name for them. With `TRITON_INTERPRET=1` there is one device, `interpreter`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.accelerator.gpu.platform import GpuPlatform, LeftOut, Survey
from zif.accelerator.gpu.software import GpuSoftware
from zif.contract import CompiledKernel, DeviceInfo, Workload
from zif_nvidia.architectures import no_bfloat16
from zif_nvidia.claims import served_gpu
from zif_nvidia.hardware import load_nvml, read_hardware
from zif_nvidia.notes import plan_notes
from zif_nvidia.settings import visible_devices
from zif_nvidia.software import build_problem, gpu_problem, read_software
from zif_nvidia.visibility import visible_gpus

if TYPE_CHECKING:
    from zif.accelerator.gpu.device import GpuParts


class NvidiaPlatform(GpuPlatform):
    """NVIDIA GPUs. `load` gives the module of nvidia-ml-py."""

    name = "nvidia"
    vendor = "zif"
    preference = 40
    device_kind = "cuda"
    communicator = "zif_nvidia.collectives.NcclGroups"

    def __init__(self, root: Path = Path("/"), load: Callable[[], Any] = load_nvml) -> None:
        super().__init__(root)
        self._load = load

    def compiled_kernels(self) -> Iterable[CompiledKernel]:
        from zif_nvidia.inspection import compiled_kernels

        return compiled_kernels()

    def _software(self) -> GpuSoftware:
        return read_software()

    def _survey(self, software: GpuSoftware) -> Survey:
        hardware = read_hardware(self._load)
        visible = visible_gpus(hardware.gpus, visible_devices())
        steps = (*hardware.steps, *visible.steps)
        if problem := hardware.problem or visible.problem or build_problem(software, hardware):
            return Survey(steps, problem=problem)
        found = [(gpu, gpu_problem(software, gpu)) for gpu in visible.gpus]
        return Survey(steps, tuple(LeftOut(why) if why else served_gpu(gpu, hardware) for gpu, why in found))

    def _notes(self, workload: Workload, device: DeviceInfo) -> Iterable[str]:
        return plan_notes(device, read_software().build, read_hardware(self._load))

    def _advice(self, workload: Workload, device: DeviceInfo) -> Iterable[str]:
        if workload.dtype == "bfloat16" and (reason := no_bfloat16(device.architecture)):
            yield reason

    def _parts(self) -> "GpuParts":
        from zif_nvidia.device import PARTS

        return PARTS
