"""Which builds of torch and Triton are installed and whether they fit, read from their files without importing them."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from zif.host.packages import installed_version, release, torch_problem
from zif_nvidia.architectures import Architecture
from zif_nvidia.hardware import Hardware

_MIN_TORCH = (2, 8)
_TRITON_RANGE = (3, 6), (3, 9)
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


@dataclass(frozen=True, slots=True)
class Software:
    """The versions found, None where a package is not there. `cuda` is what torch was built for, () for no CUDA."""

    torch: str | None
    cuda: tuple[int, ...]
    triton: str | None

    @classmethod
    def read(cls) -> "Software":
        """Read what is installed."""
        torch = installed_version("torch")
        return cls(torch, cuda_of_torch(torch) if torch else (), installed_version("triton"))

    def steps(self) -> tuple[str, ...]:
        """Say what was found."""
        return (
            f"torch: {self.torch or 'not installed'}",
            f"CUDA that torch is built for: {_dotted(self.cuda) or 'none'}",
            f"triton: {self.triton or 'not installed'}",
        )

    def problems(self) -> tuple[str, ...]:
        """Say what is missing or does not fit, whatever the device."""
        return tuple(filter(None, (torch_problem(self.torch, _MIN_TORCH), _triton_problem(self.triton))))

    def build_problem(self, hardware: Hardware) -> str:
        """Say why this build of torch cannot run under this driver, with the next step; "" when it can."""
        if self.torch is None:
            return ""
        if not self.cuda:
            return (
                f"torch {self.torch} is not built for CUDA; install the wheel of a build that is, "
                f"{_wheel_for(hardware)}: PyTorch's installation page has the command"
            )
        oldest = _OLDEST_DRIVERS.get(self.cuda[0], "")
        too_old = _numbers(hardware.driver) < _numbers(oldest) and hardware.cuda < self.cuda
        if hardware.driver and oldest and too_old:
            return (
                f"the NVIDIA driver {hardware.driver} is too old for torch {self.torch}, built for CUDA "
                f"{_dotted(self.cuda)}, which needs {oldest} or later; update the driver, or install a build of torch "
                f"for CUDA {_dotted(hardware.cuda)}"
            )
        return ""

    def minor_version_note(self, hardware_cuda: tuple[int, int]) -> str:
        """Say that the driver serves this build's CUDA as an older minor version of the same major one; else ""."""
        if not self.cuda or not any(hardware_cuda) or hardware_cuda >= self.cuda:
            return ""
        own = _OWN_DRIVERS.get((self.cuda[0], self.cuda[1]), "")
        return (
            f"the driver serves CUDA {_dotted(hardware_cuda)} and torch is built for {_dotted(self.cuda)}: that works, "
            f"without what is new in it{f'; driver {own} has all of it' if own else ''}"
        )

    def architecture_problem(self, architecture: Architecture) -> str:
        """Say why what is installed holds no code for an architecture, with the next step; "" when it may."""
        if self.cuda < architecture.min_cuda:
            wanted = _dotted(architecture.min_cuda)
            return f"{architecture.name} needs a build of torch for CUDA {wanted} or later, and torch is {self.torch}"
        if architecture.last_cuda is not None and self.cuda[0] > architecture.last_cuda:
            last = architecture.last_cuda
            return f"{architecture.name} needs a build of torch for CUDA {last} or earlier, and torch is {self.torch}"
        if self.triton is not None and release(self.triton) < architecture.min_triton:
            wanted = _dotted(architecture.min_triton)
            return f"{architecture.name} needs triton {wanted} or later, and triton is {self.triton}"
        return ""


def cuda_of_torch(version: str) -> tuple[int, ...]:
    """Return the CUDA that the installed torch is built for, () for none.

    Its file of versions says so, because wheels of the main index have no suffix; where it is not found, the suffix.
    """
    spec = importlib.util.find_spec("torch")
    found = None
    if spec is not None and spec.origin is not None:
        try:
            found = _CUDA_LINE.search((Path(spec.origin).parent / "version.py").read_text(encoding="utf-8"))
        except OSError:
            suffix = _SUFFIX.search(version)
            return (int(suffix[1]), int(suffix[2])) if suffix else ()
    return release(found[1]) if found else ()


def _triton_problem(version: str | None) -> str:
    first, last = (_dotted(end) for end in _TRITON_RANGE)
    if version is None:
        return f"triton is not installed; install triton {first} to {last}"
    if not _TRITON_RANGE[0] <= release(version) <= _TRITON_RANGE[1]:
        return f"triton {version} is not supported; install triton {first} to {last}, and the torch that goes with it"
    return ""


def _wheel_for(hardware: Hardware) -> str:
    """Name the newest folder of torch's wheels that the driver serves."""
    return "cu130" if hardware.cuda >= (13, 0) else "cu128" if hardware.cuda >= (12, 8) else "cu126"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
