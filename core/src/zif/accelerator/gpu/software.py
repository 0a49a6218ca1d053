"""Which builds of torch and Triton are installed and whether the kernels run with them, read without importing them."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from zif.host.packages import release, torch_problem

_MIN_TORCH = (2, 8)
_TRITON_RANGE = (3, 6), (3, 9)


@dataclass(frozen=True, slots=True)
class GpuSoftware:
    """The versions found, None where a package is not there.

    `build` is the release of the vendor's `toolkit` that torch was built for, () for none.
    """

    toolkit: str
    torch: str | None
    build: tuple[int, ...]
    triton: str | None

    def steps(self) -> tuple[str, ...]:
        """Say what was found."""
        return (
            f"torch: {self.torch or 'not installed'}",
            f"{self.toolkit} that torch is built for: {dotted(self.build) or 'none'}",
            f"triton: {self.triton or 'not installed'}",
        )

    def problems(self) -> tuple[str, ...]:
        """Say what is missing or does not fit, whatever the device."""
        return tuple(filter(None, (torch_problem(self.torch, _MIN_TORCH), _triton_problem(self.triton))))


def build_of_torch(line: re.Pattern[str]) -> tuple[int, ...] | None:
    """Return the release that the first group of `line` finds in the installed torch's file of versions.

    () where it finds none, None where there is no such file.
    """
    folder = package_folder("torch")
    if folder is None:
        return None
    try:
        found = line.search((folder / "version.py").read_text(encoding="utf-8"))
    except OSError:
        return None
    return release(found[1]) if found else ()


def package_folder(package: str) -> Path | None:
    """Return where a package lies that could be imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # `sys.modules[package] = None`
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def dotted(version: tuple[int, ...]) -> str:
    """Return "12.8" of (12, 8)."""
    return ".".join(map(str, version))


def _triton_problem(version: str | None) -> str:
    first, last = map(dotted, _TRITON_RANGE)
    if version is None:
        return f"triton is not installed; install triton {first} to {last}"
    if not _TRITON_RANGE[0] <= release(version) <= _TRITON_RANGE[1]:
        return f"triton {version} is not supported; install triton {first} to {last}, and the torch that goes with it"
    return ""
