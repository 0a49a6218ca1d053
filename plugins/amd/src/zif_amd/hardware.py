"""Which AMD GPUs there are, read from the files of the driver: no runtime is loaded and no context is made.

KFD, the part of the amdgpu driver that computes, lists every device as a node with its properties
(Documentation/ABI/testing/sysfs-class-kfd and kfd_topology.c of Linux); DRM's folder of the same device has memory in
use, names and partitions (Documentation/gpu/amdgpu/driver-misc.rst).
"""

import grp
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zif_amd.architectures import target_name

_AMD = "0x1002"
_DISPLAY_CLASSES = ("0x03", "0x12")
_HEAPS_OF_THE_DEVICE = (1, 2)
"""Kinds of memory banks: the part of the device's memory that the host sees, and the part that it does not."""

_MODULE = "sys/module/amdgpu"
_NODES = "sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as the driver lists it; a part of a GPU where that is partitioned.

    `target_version` is KFD's number of the architecture, `partition` its modes ("SPX/NPS1"), "" where it has none.
    `problem` says why this process cannot open the device, "" if it can.
    """

    node: int
    target_version: int
    wave_size: int
    lds_bytes: int
    num_simds: int
    memory_bytes: int
    used_bytes: int
    busy_percent: int | None
    pci_address: str
    pci_id: str
    product: str
    unique_id: str
    partition: str
    problem: str

    @property
    def architecture(self) -> str:
        """Return the compiler's name of the architecture."""
        return target_name(self.target_version)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The driver and its devices, in the order in which the runtime counts them.

    `driver` is the driver's version, or which kernel it came with; "" without one. `release` is the version alone,
    empty where the driver came with the kernel. `problem` says why there is no device at all.
    """

    driver: str
    release: tuple[int, ...]
    gpus: tuple[Gpu, ...]
    problem: str
    steps: tuple[str, ...]


def read_hardware(root: Path = Path("/")) -> Hardware:
    """Read what the system's files say. Raises nothing for absent files."""
    version = _text(root / _MODULE / "version")
    driver = version or _kernels_own(root)
    nodes = [*_nodes(root)]
    gpus = tuple(_gpu(root, number, properties) for number, properties in nodes if properties.get("simd_count"))
    release = tuple(int(part) for part in version.split(".") if part.isdecimal())
    problem = "" if gpus else _absence(root, driver)
    if gpus and (denied := access_problem(root, "dev/kfd")):
        problem = denied
    steps = (
        f"amdgpu driver: {driver or 'not loaded'}",
        f"KFD nodes: {len(nodes)}, of them GPUs: {len(gpus)}",
        *(_step(gpu) for gpu in gpus),
    )
    return Hardware(driver, release, gpus, problem, steps)


def access_problem(root: Path, name: str) -> str:
    """Say why this process cannot use a device file, with the next step; "" when it can."""
    path = root / name
    try:
        group = path.stat().st_gid
    except OSError:
        return f"/{name} is not here; start the container with --device=/dev/kfd --device=/dev/dri"
    if os.access(path, os.R_OK | os.W_OK):
        return ""
    return (
        f"no access to /{name}; join the group {_group_name(group)} ({group}), or --group-add {group} for a container"
    )


def _absence(root: Path, driver: str) -> str:
    """Say why the driver lists no GPU."""
    on_bus = [*_on_bus(root)]
    if not driver and on_bus:
        return f"there is an AMD GPU ({on_bus[0]}), but the kernel's driver amdgpu is not loaded; install or load it"
    if not driver:
        return "there is no AMD GPU in this host, and no amdgpu driver"
    if not (root / _NODES).is_dir():
        return (
            "the amdgpu driver is loaded without KFD, the part that computes; use a kernel that is built with HSA_AMD"
        )
    if any(_is_hidden(folder) for folder in (root / _NODES).glob("[0-9]*")):
        return "this container may not use the host's GPUs; start it with --device=/dev/kfd --device=/dev/dri"
    return "the amdgpu driver is loaded, but it lists no GPU that computes"


def _nodes(root: Path) -> Iterator[tuple[int, Mapping[str, int]]]:
    """Yield the nodes by number: processors, too, which have no SIMDs."""
    folders = [folder for folder in (root / _NODES).glob("[0-9]*") if folder.name.isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name)):
        yield int(folder.name), _properties(folder / "properties")


def _gpu(root: Path, number: int, properties: Mapping[str, int]) -> Gpu:
    pci_address = _pci_address(properties)
    minor = properties.get("drm_render_minor", 0)
    folder = root / f"sys/class/drm/renderD{minor}/device"
    if not (folder / "mem_info_vram_total").exists():
        # The render node of a part of a GPU is of no device on the bus; the whole GPU's folder has the files.
        folder = root / "sys/bus/pci/devices" / pci_address
    total, used = _number(folder / "mem_info_vram_total"), _number(folder / "mem_info_vram_used")
    banks = _bank_bytes(root / _NODES / str(number))
    if banks > total:  # memory shared with the host, where the driver lends more than was set apart at boot
        used += _number(folder / "mem_info_gtt_used")
    memory_bytes = banks or total
    busy = _text(folder / "gpu_busy_percent")
    modes = [_text(folder / f"current_{kind}_partition") for kind in ("compute", "memory")]
    return Gpu(
        node=number,
        target_version=properties.get("gfx_target_version", 0),
        wave_size=properties.get("wave_front_size", 0),
        lds_bytes=properties.get("lds_size_in_kb", 0) << 10,
        num_simds=properties["simd_count"],
        memory_bytes=memory_bytes,
        used_bytes=min(used, memory_bytes),
        busy_percent=int(busy) if busy.isdecimal() else None,
        pci_address=pci_address,
        pci_id=_text(folder / "device"),
        product=_text(folder / "product_name"),
        unique_id=f"{properties.get('unique_id', 0):016x}",
        partition="/".join(filter(None, modes)),
        problem=access_problem(root, f"dev/dri/renderD{minor}"),
    )


def _bank_bytes(node: Path) -> int:
    """Sum the node's own memory. Where a GPU is partitioned, KFD alone knows each part's share."""
    banks = [_properties(path) for path in node.glob("mem_banks/*/properties")]
    return sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in _HEAPS_OF_THE_DEVICE)


def _pci_address(properties: Mapping[str, int]) -> str:
    """Return domain:bus:device.function of a node; the location holds bus, device and function in 8, 5 and 3 bits."""
    location = properties.get("location_id", 0)
    bus, device, function = location >> 8 & 0xFF, location >> 3 & 0x1F, location & 0x7
    return f"{properties.get('domain', 0):04x}:{bus:02x}:{device:02x}.{function}"


def _on_bus(root: Path) -> Iterator[str]:
    """Yield the addresses of AMD's displays and accelerators on the PCI bus, whether or not a driver is bound."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _text(folder / "vendor") == _AMD and _text(folder / "class").startswith(_DISPLAY_CLASSES):
            yield folder.name


def _kernels_own(root: Path) -> str:
    """Name a driver that states no version: it came with the kernel."""
    if not (root / _MODULE).is_dir():
        return ""
    return f"of Linux {_text(root / 'proc/sys/kernel/osrelease') or 'of unknown version'}"


def _is_hidden(node: Path) -> bool:
    """Say whether the node's properties are kept from this process: KFD follows the device rules of control groups."""
    return not _properties(node / "properties")


def _step(gpu: Gpu) -> str:
    busy = "" if gpu.busy_percent is None else f", {gpu.busy_percent} % busy"
    partition = f", partition {gpu.partition}" if gpu.partition else ""
    problem = f", not usable: {gpu.problem}" if gpu.problem else ""
    memory = f"{gpu.used_bytes} of {gpu.memory_bytes} bytes in use"
    return f"node {gpu.node}: {gpu.architecture} at {gpu.pci_address}, {memory}{busy}{partition}{problem}"


def _group_name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return "that owns it"


def _properties(path: Path) -> dict[str, int]:
    """Read lines of a name and a number; empty where the file cannot be read."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
