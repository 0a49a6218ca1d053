"""Which builds of torch and Triton are installed and whether they fit, read from their files without importing them."""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from zif.host.packages import installed_version, release, torch_problem
from zif_amd.architectures import Architecture
from zif_amd.hardware import Hardware

_MIN_TORCH = (2, 8)
_TRITON_RANGE = (3, 6), (3, 9)

# torch's builds for ROCm bring Triton under names of their own; all are imported as `triton`.
_TRITON_DISTRIBUTIONS = ("triton", "pytorch_triton_rocm", "triton_rocm")
_ROCM_LINE = re.compile(r"^(?:hip|rocm)\b[^=]*=\s*'(\d+\.\d+)", re.MULTILINE)

# ROCm of the build of torch, and the oldest separate driver that AMD supports under it (rocm.docs.amd.com, user and AMD
# GPU driver support matrix). Its module counts differently: 6.7.0 came with ROCm 6.1, 6.8.5 with 6.2, 6.10.5 with 6.3.
_OLDEST_DRIVERS = (((7, 1), (6, 10, 5)), ((7, 0), (6, 8, 5)), ((6, 3), (6, 7, 0)))


@dataclass(frozen=True, slots=True)
class Software:
    """The versions found, None where a package is not there. `rocm` is what torch was built for, "" for no ROCm."""

    torch: str | None
    rocm: str
    triton: str | None

    @classmethod
    def read(cls) -> "Software":
        """Read what is installed."""
        torch = installed_version("torch")
        return cls(torch, rocm_of_torch() if torch else "", triton_version())

    def steps(self) -> tuple[str, ...]:
        """Say what was found."""
        return (
            f"torch: {self.torch or 'not installed'}",
            f"ROCm that torch is built for: {self.rocm or 'none'}",
            f"triton: {self.triton or 'not installed'}",
        )

    def problems(self) -> tuple[str, ...]:
        """Say what is missing or does not fit, whatever the device."""
        return tuple(filter(None, (torch_problem(self.torch, _MIN_TORCH), _triton_problem(self.triton))))

    def build_problem(self, hardware: Hardware) -> str:
        """Say why this build of torch drives no AMD GPU under this driver, with the next step; "" when it does."""
        if self.torch is None:
            return ""
        if not self.rocm:
            return (
                f"torch {self.torch} is not built for ROCm; install the wheel of a build that is, whose version "
                "ends in +rocm6.4 or later: PyTorch's installation page has the command"
            )
        oldest = next((driver for rocm, driver in _OLDEST_DRIVERS if release(self.rocm) >= rocm), ())
        if hardware.release and hardware.release < oldest:
            return (
                f"the amdgpu driver {hardware.driver} is too old for torch {self.torch}, built for ROCm {self.rocm}, "
                f"which needs {'.'.join(map(str, oldest))}; update the driver or install a build for an older ROCm"
            )
        return ""

    def architecture_problem(self, architecture: Architecture) -> str:
        """Say why this build of torch holds no code for an architecture; "" when it may."""
        if self.rocm and release(self.rocm) < architecture.min_rocm:
            wanted = ".".join(map(str, architecture.min_rocm))
            return (
                f"{architecture.name} needs ROCm {wanted}, and torch {self.torch} is built for ROCm {self.rocm}; "
                "install a newer build"
            )
        return ""


def rocm_of_torch() -> str:
    """Return the ROCm that the installed torch is built for, "" for none. Its file of versions says so."""
    folder = _folder("torch")
    if folder is None:
        return ""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = _ROCM_LINE.search(text)
    return found.group(1) if found else ""


def triton_version() -> str | None:
    """Return the version of the installed Triton, None without one."""
    if _folder("triton") is None:
        return None
    return next(filter(None, map(_distribution_version, _TRITON_DISTRIBUTIONS)), None)


def _triton_problem(version: str | None) -> str:
    first, last = (".".join(map(str, end)) for end in _TRITON_RANGE)
    if version is None:
        return f"triton is not installed; install triton {first} to {last}"
    if not _TRITON_RANGE[0] <= release(version) <= _TRITON_RANGE[1]:
        return f"triton {version} is not supported; install triton {first} to {last}, and the torch that goes with it"
    return ""


def _folder(package: str) -> Path | None:
    """Return where a package lies that could be imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # `sys.modules[package] = None`
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
