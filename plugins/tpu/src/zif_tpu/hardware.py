"""Which TPU chips there are, read from the files of the system: no driver is called and no library loaded."""

from dataclasses import dataclass
from pathlib import Path

_GOOGLE = "0x1ae0"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation of chips. `memory_bytes` is one chip's (Google Cloud TPU documentation, system architecture)."""

    name: str
    memory_bytes: int


# PCI device ids as the drivers of JAX and torch_xla list them.
_GENERATIONS = {
    "0x0027": Generation("v3", 32 * _GIB),
    "0x005e": Generation("v4", 32 * _GIB),
    "0x0062": Generation("v5p", 95 * _GIB),
    "0x0063": Generation("v5e", 16 * _GIB),
    "0x006f": Generation("v6e", 32 * _GIB),
}


@dataclass(frozen=True, slots=True)
class Chips:
    """The chips of this host. `generation` is None when none can be used; `num_on_bus` counts those too."""

    count: int
    num_on_bus: int
    generation: Generation | None
    steps: tuple[str, ...]


def read_chips(root: Path = Path("/")) -> Chips:
    """Read the chips from `/sys/bus/pci` under `root`. Raises nothing for files that are absent."""
    ids = [
        _text(folder / "device")
        for folder in sorted((root / "sys/bus/pci/devices").glob("*"))
        if _text(folder / "vendor") == _GOOGLE and _text(folder / "device") in _GENERATIONS
    ]
    nodes = sorted(str(path.name) for pattern in ("accel*", "vfio/[0-9]*") for path in (root / "dev").glob(pattern))
    steps = (f"PCI devices of known TPU generations: {len(ids)}", f"device files: {', '.join(nodes) or 'none'}")
    count = len(ids) if nodes else 0
    return Chips(count, len(ids), _GENERATIONS[ids[0]] if count else None, steps)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
