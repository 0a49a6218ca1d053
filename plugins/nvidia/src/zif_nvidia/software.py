"""Which CUDA the installed torch is built for, and whether driver and architectures go with it. Imports neither."""

import re

from zif.accelerator.gpu.software import GpuSoftware, build_of_torch, dotted
from zif.host.packages import installed_version, release
from zif_nvidia.architectures import ARCHITECTURES, why_unsupported
from zif_nvidia.hardware import Gpu, Hardware

_CUDA_LINE = re.compile(r"^cuda\b[^=]*=\s*'(\d+\.\d+)", re.MULTILINE)
_SUFFIX = re.compile(r"\+cu(\d+)(\d)\b")

# Major version of CUDA, and the oldest driver that serves any of its minor versions, for code compiled for the device
# (CUDA compatibility guide, minor version compatibility). A driver that is older than the one that came with the minor
# version serves all but what is new in it (CUDA toolkit release notes, table of toolkits and drivers).
_OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_OWN_DRIVERS = {
    (12, 0): "525.60.13",
    (12, 1): "530.30.02",
    (12, 4): "550.54.14",
    (12, 6): "560.28.03",
    (12, 8): "570.26",
    (12, 9): "575.51.03",
    (13, 0): "580.65.06",
}


def read_software() -> GpuSoftware:
    """Read what is installed."""
    torch = installed_version("torch")
    return GpuSoftware("CUDA", torch, cuda_of_torch(torch) if torch else (), installed_version("triton"))


def build_problem(software: GpuSoftware, hardware: Hardware) -> str:
    """Say why this build of torch cannot run under this driver, with the next step; "" when it can."""
    torch, cuda = software.torch, software.build
    if torch is None:
        return ""
    if not cuda:
        return (
            f"torch {torch} is not built for CUDA; install the wheel of a build that is, {_wheel_for(hardware)}: "
            "PyTorch's installation page has the command"
        )
    oldest = _OLDEST_DRIVERS.get(cuda[0], "")
    too_old = _numbers(hardware.driver) < _numbers(oldest) and hardware.cuda < cuda
    if hardware.driver and oldest and too_old:
        return (
            f"the NVIDIA driver {hardware.driver} is too old for torch {torch}, built for CUDA {dotted(cuda)}, which "
            f"needs {oldest} or later; update the driver, or install a build of torch for CUDA {dotted(hardware.cuda)}"
        )
    return ""


def gpu_problem(software: GpuSoftware, gpu: Gpu) -> str:
    """Say why a GPU cannot be used with what is installed, with the next step; "" when it may."""
    if gpu.problem:
        return f"{gpu.name}: {gpu.problem}"
    if reason := why_unsupported(gpu.architecture):
        return reason
    architecture, torch, triton = ARCHITECTURES[gpu.architecture], software.torch, software.triton
    needs = f"{architecture.name} needs"
    if software.build < architecture.min_cuda:
        return f"{needs} a build of torch for CUDA {dotted(architecture.min_cuda)} or later, and torch is {torch}"
    if architecture.last_cuda is not None and software.build[0] > architecture.last_cuda:
        return f"{needs} a build of torch for CUDA {architecture.last_cuda} or earlier, and torch is {torch}"
    if triton is not None and release(triton) < architecture.min_triton:
        return f"{needs} triton {dotted(architecture.min_triton)} or later, and triton is {triton}"
    return ""


def minor_version_note(cuda: tuple[int, ...], driver_cuda: tuple[int, int]) -> str:
    """Say that the driver serves this build's CUDA as an older minor version of the same major one; else ""."""
    if not cuda or not any(driver_cuda) or driver_cuda >= cuda:
        return ""
    own = _OWN_DRIVERS.get((cuda[0], cuda[1]), "")
    return (
        f"the driver serves CUDA {dotted(driver_cuda)} and torch is built for {dotted(cuda)}: that works, "
        f"without what is new in it{f'; driver {own} has all of it' if own else ''}"
    )


def cuda_of_torch(version: str) -> tuple[int, ...]:
    """Return the CUDA that the installed torch is built for, () for none.

    Its file of versions says so, because wheels of the main index have no suffix; where it is not found, the suffix.
    """
    if (cuda := build_of_torch(_CUDA_LINE)) is not None:
        return cuda
    suffix = _SUFFIX.search(version)
    return (int(suffix[1]), int(suffix[2])) if suffix else ()


def _wheel_for(hardware: Hardware) -> str:
    """Name the newest folder of torch's wheels that the driver serves."""
    return "cu130" if hardware.cuda >= (13, 0) else "cu128" if hardware.cuda >= (12, 8) else "cu126"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
