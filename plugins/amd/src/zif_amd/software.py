"""Which ROCm the installed torch is built for, and whether driver and architectures go with it. Imports neither."""

import importlib.metadata
import re

from zif.accelerator.gpu.software import GpuSoftware, build_of_torch, dotted, package_folder
from zif.host.packages import installed_version
from zif_amd.architectures import Architecture
from zif_amd.hardware import Hardware

# torch's builds for ROCm bring Triton under names of their own; all are imported as `triton`.
_TRITON_DISTRIBUTIONS = ("triton", "pytorch_triton_rocm", "triton_rocm")
_ROCM_LINE = re.compile(r"^(?:hip|rocm)\b[^=]*=\s*'(\d+\.\d+)", re.MULTILINE)

# ROCm of the build of torch, and the oldest separate driver that AMD supports under it (rocm.docs.amd.com, user and AMD
# GPU driver support matrix). Its module counts differently: 6.7.0 came with ROCm 6.1, 6.8.5 with 6.2, 6.10.5 with 6.3.
_OLDEST_DRIVERS = (((7, 1), (6, 10, 5)), ((7, 0), (6, 8, 5)), ((6, 3), (6, 7, 0)))


def read_software() -> GpuSoftware:
    """Read what is installed."""
    torch = installed_version("torch")
    return GpuSoftware("ROCm", torch, rocm_of_torch() if torch else (), triton_version())


def build_problem(software: GpuSoftware, hardware: Hardware) -> str:
    """Say why this build of torch drives no AMD GPU under this driver, with the next step; "" when it does."""
    torch, rocm = software.torch, software.build
    if torch is None:
        return ""
    if not rocm:
        return (
            f"torch {torch} is not built for ROCm; install the wheel of a build that is, whose version ends in "
            "+rocm6.4 or later: PyTorch's installation page has the command"
        )
    oldest = next((driver for first, driver in _OLDEST_DRIVERS if rocm >= first), ())
    if hardware.release and hardware.release < oldest:
        return (
            f"the amdgpu driver {hardware.driver} is too old for torch {torch}, built for ROCm {dotted(rocm)}, which "
            f"needs {dotted(oldest)}; update the driver or install a build for an older ROCm"
        )
    return ""


def architecture_problem(software: GpuSoftware, architecture: Architecture) -> str:
    """Say why this build of torch holds no code for an architecture; "" when it may."""
    if software.build and software.build < architecture.min_rocm:
        wanted, own = dotted(architecture.min_rocm), dotted(software.build)
        return (
            f"{architecture.name} needs ROCm {wanted}, and torch {software.torch} is built for ROCm {own}; "
            "install a newer build"
        )
    return ""


def rocm_of_torch() -> tuple[int, ...]:
    """Return the ROCm that the installed torch is built for, () for none."""
    return build_of_torch(_ROCM_LINE) or ()


def triton_version() -> str | None:
    """Return the version of the installed Triton, None without one."""
    if package_folder("triton") is None:
        return None
    return next(filter(None, map(_distribution_version, _TRITON_DISTRIBUTIONS)), None)


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
