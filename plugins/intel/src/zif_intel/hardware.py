"""Which GPUs and NUMA nodes there are, read from the files of the system: no driver is called, no library loaded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_INTEL = "0x8086"
_DISPLAY_CLASS = "0x03"
_MEMORY_FILES = ("lmem_total_bytes", "device/tile0/physical_vram_size_bytes")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One discrete GPU. `memory_bytes` is what the driver says, or the size of its largest window, 0 if unknown."""

    card: str
    device_id: str
    driver: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node and the processors in it."""

    number: int
    processors: frozenset[int]


def read_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """Return the Intel GPUs with memory of their own that a driver is bound to. Raises nothing for absent files."""
    return tuple(_gpus(root))


def read_numa_nodes(root: Path = Path("/")) -> tuple[NumaNode, ...]:
    """Return the nodes that have processors, in order; none where the system does not say."""
    folder = root / "sys/devices/system/node"
    numbers = sorted(int(path.name[4:]) for path in folder.glob("node[0-9]*") if path.name[4:].isdecimal())
    nodes = [NumaNode(number, _processors(_text(folder / f"node{number}" / "cpulist"))) for number in numbers]
    return tuple(node for node in nodes if node.processors)


def _gpus(root: Path) -> Iterator[Gpu]:
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        device = card / "device"
        if _text(device / "vendor") != _INTEL or not _text(device / "class").startswith(_DISPLAY_CLASS):
            continue
        driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
        memory_bytes = next((int(t) for name in _MEMORY_FILES if (t := _text(card / name)).isdecimal()), 0)
        memory_bytes = memory_bytes or _largest_window(device / "resource")
        if driver and memory_bytes:
            yield Gpu(card.name, _text(device / "device"), driver, memory_bytes)


def _largest_window(resource: Path) -> int:
    """Return the size of the largest prefetchable region of a PCI device: lines of start, end and flags, in hex.

    A GPU that shares the host's memory has none of a size worth naming.
    """
    sizes = [0]
    for line in _text(resource).splitlines():
        with contextlib.suppress(ValueError):  # a line of another form says nothing
            start, end, flags = (int(field, 16) for field in line.split())
            if flags & 0x2000 and end > start:
                sizes.append(end - start + 1)
    return largest if (largest := max(sizes)) > 1 << 30 else 0


def _processors(text: str) -> frozenset[int]:
    """Read a list like `0-3,8,10-11` (cpuset(7))."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        with contextlib.suppress(ValueError):
            found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
