"""What the host says about its processor and its memory, within the limits that its control groups set.

Reads text files under an injectable root, so that tests can fake a machine; a system without `/proc` answers through
psutil. Not here: what a platform makes of it. Standard library only until the fallback.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_X86_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_ARM_FEATURES = ("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16")


@dataclass(frozen=True, slots=True)
class Host:
    """The machine as this process may use it. `steps` lists what was read, in order."""

    processor: str
    architecture: str
    isa_features: tuple[str, ...]
    num_cores: int
    memory_bytes: int
    available_bytes: int
    steps: tuple[str, ...]


def read_host(root: Path = Path("/")) -> Host:
    """Read the host's facts from the files under `root`. Raises nothing for files that are absent."""
    cpuinfo = _fields(root / "proc/cpuinfo")
    groups = _control_groups(root)
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    affinity = _affinity()
    quota = min((g.cores for g in groups if g.cores is not None), default=None)
    num_cores = affinity if quota is None else max(1, min(affinity, int(quota)))
    memory = _memory(root)
    limited_total = min([memory.total, *(g.memory_limit for g in groups if g.memory_limit is not None)])
    limited_available = min([memory.available, *(g.memory_left for g in groups if g.memory_left is not None)])
    limits = ", ".join(g.describe() for g in groups if g.describe()) or "none"
    return Host(
        processor=cpuinfo.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        isa_features=tuple(feature for feature in _X86_FEATURES + _ARM_FEATURES if feature in flags),
        num_cores=num_cores,
        memory_bytes=limited_total,
        available_bytes=limited_available,
        steps=(
            f"cores: {affinity} by affinity, quota {'none' if quota is None else quota}",
            f"memory: {memory.total} bytes in the machine, {memory.available} available",
            f"control group limits: {limits}",
        ),
    )


@dataclass(frozen=True, slots=True)
class _ControlGroup:
    """The limits of one control group; None where it sets none."""

    path: str
    cores: float | None
    memory_limit: int | None
    memory_left: int | None

    def describe(self) -> str:
        cores = [] if self.cores is None else [f"{self.cores:g} cores"]
        memory = [] if self.memory_limit is None else [f"{self.memory_limit} bytes"]
        limits = " and ".join(cores + memory)
        return f"{self.path}: {limits}" if limits else ""


def _control_groups(root: Path) -> list[_ControlGroup]:
    """Return the process's control groups of either version, innermost first, each with all its ancestors.

    `/proc/self/cgroup` has lines `id:controllers:path`; version 2 has id 0 and no controllers (cgroups(7)). Inside a
    container the path may not exist below the mount, but its ancestors, the mount itself among them, do.
    """
    groups = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for mount in _mounts(root / "sys/fs/cgroup", hierarchy, controllers.split(",")):
            for folder in _with_ancestors(mount, path):
                groups.append(_read_group(folder, root))
    return groups


def _mounts(base: Path, hierarchy: str, controllers: list[str]) -> Iterator[Path]:
    if hierarchy == "0":
        yield from (mount for mount in (base, base / "unified") if (mount / "cgroup.controllers").exists())
    elif "memory" in controllers or "cpu" in controllers:
        names = {",".join(controllers), *controllers}
        yield from (base / name for name in sorted(names) if (base / name).is_dir())


def _with_ancestors(mount: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:depth])
        if folder.is_dir():
            yield folder


def _read_group(folder: Path, root: Path) -> _ControlGroup:
    """Read one folder, whichever version's files it has."""
    limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
    if limit is not None and limit >= 1 << 60:  # version 1 writes "no limit" as the largest page-aligned integer
        limit = None
    return _ControlGroup(
        path="/" + str(folder.relative_to(root)),
        cores=_quota(folder),
        memory_limit=limit,
        memory_left=None if limit is None else max(0, limit - _memory_used(folder)),
    )


def _quota(folder: Path) -> float | None:
    """Return the cores that the group's quota of processor time amounts to."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _memory_used(folder: Path) -> int:
    """Return the bytes in use that the kernel cannot take back: usage less the inactive page cache."""
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
    return max(0, used - int(reclaimable)) if reclaimable.isdecimal() else used


@dataclass(frozen=True, slots=True)
class _Memory:
    total: int
    available: int


def _memory(root: Path) -> _Memory:
    kibibytes = {name: value.split()[0] for name, value in _fields(root / "proc/meminfo").items() if value}
    if "MemTotal" in kibibytes and "MemAvailable" in kibibytes:
        return _Memory(int(kibibytes["MemTotal"]) * 1024, int(kibibytes["MemAvailable"]) * 1024)
    import psutil

    memory = psutil.virtual_memory()
    return _Memory(memory.total, memory.available)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fields(path: Path) -> dict[str, str]:
    """Return the `name: value` lines of a file; of a name that comes again, the first."""
    found: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
