"""Machines as files: what the driver of AMD GPUs writes, for tests on machines without one; and installed versions."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from zif.host.packages import release

GIB = 1 << 30
_VARIABLES = (
    "TRITON_INTERPRET",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
)


@dataclass(frozen=True)
class Card:
    """One GPU. `modes` are its partitions, `unique_id` what the runtime prints after `GPU-`."""

    target_version: int
    pci_id: str = "0x74a1"
    memory_bytes: int = 192 * GIB
    used_bytes: int = GIB
    wave_size: int = 64
    lds_kib: int = 64
    num_simds: int = 1216
    product: str = ""
    modes: tuple[str, str] = ("", "")
    unique_id: int = 0
    location: int | None = None


CARDS = {
    "MI300X": Card(90402, product="AMD Instinct MI300X OAM", modes=("SPX", "NPS1")),
    "MI250": Card(90010, "0x740c", 64 * GIB, num_simds=416),
    "MI350": Card(90500, "0x75a0", 288 * GIB, lds_kib=160),
    "RX7900": Card(110000, "0x744c", 24 * GIB, wave_size=32, num_simds=192),
    "RX9070": Card(120001, "0x7550", 16 * GIB, wave_size=32, num_simds=128),
    "Vega": Card(90006, "0x66af", 16 * GIB, num_simds=240),
    "RX6800": Card(100300, "0x73bf", 16 * GIB, wave_size=32, num_simds=144),
    "780M": Card(110003, "0x15bf", 4 * GIB, wave_size=32, num_simds=24),
}


@dataclass
class Machine:
    """A root folder with a processor, and what is added to it."""

    root: Path
    num_nodes: int = 1
    denied: set[str] = field(default_factory=set)

    def write(self, files):
        """Write files by their path under the root."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def add_driver(self, version="6.14.14"):
        """Load the driver; version "" is the one that came with the kernel."""
        self.write(
            {"dev/kfd": "", "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 8\nsimd_count 0\n"}
        )
        self.write({"sys/module/amdgpu/initstate": "live\n", "proc/sys/kernel/osrelease": "6.8.0-55-generic\n"})
        if version:
            self.write({"sys/module/amdgpu/version": f"{version}\n"})

    def add(self, name, *, render_folder=True, **changes):
        """Add a GPU; without a render folder it is a part of one, whose files are in the folder on the bus."""
        card = replace(CARDS[name], **changes)
        number, self.num_nodes = self.num_nodes, self.num_nodes + 1
        node, minor = f"sys/class/kfd/kfd/topology/nodes/{number}", 127 + number
        properties = {
            "simd_count": card.num_simds,
            "lds_size_in_kb": card.lds_kib,
            "wave_front_size": card.wave_size,
            "gfx_target_version": card.target_version,
            "location_id": number << 8 if card.location is None else card.location,
            "domain": 0,
            "drm_render_minor": minor,
            "unique_id": card.unique_id,
        }
        self.write({f"{node}/properties": "".join(f"{name} {value}\n" for name, value in properties.items())})
        bank = f"heap_type 1\nsize_in_bytes {card.memory_bytes}\nflags 0\n"
        self.write({f"{node}/mem_banks/0/properties": bank, f"dev/dri/renderD{minor}": ""})
        folder = (
            f"sys/class/drm/renderD{minor}/device" if render_folder else f"sys/bus/pci/devices/0000:{number:02x}:00.0"
        )
        self.write(
            {
                f"{folder}/vendor": "0x1002\n",
                f"{folder}/device": f"{card.pci_id}\n",
                f"{folder}/mem_info_vram_total": f"{card.memory_bytes}\n",
                f"{folder}/mem_info_vram_used": f"{card.used_bytes}\n",
                f"{folder}/gpu_busy_percent": "7\n",
            }
        )
        if card.product:
            self.write({f"{folder}/product_name": f"{card.product}\n"})
        for kind, mode in zip(("compute", "memory"), card.modes, strict=True):
            if mode:
                self.write({f"{folder}/current_{kind}_partition": f"{mode}\n"})

    def deny(self, name):
        """Take away this process's access to a device file."""
        self.denied.add(str(self.root / name))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU, and no variable of ROCm or Triton set."""
    made = Machine(tmp_path)
    made.write({"proc/cpuinfo": "model name : Some processor\n", "proc/self/cgroup": ""})
    made.write({"proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\n"})
    access = os.access
    monkeypatch.setattr(
        "zif_amd.hardware.os.access", lambda path, mode: str(path) not in made.denied and access(path, mode)
    )
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def versions(monkeypatch):
    """Installed versions, those that fit unless a test changes them."""
    installed = {"torch": "2.11.0+rocm7.1", "rocm": "7.1", "triton": "3.6.0"}
    monkeypatch.setattr("zif_amd.software.installed_version", installed.get)
    monkeypatch.setattr("zif_amd.software.rocm_of_torch", lambda: release(installed["rocm"]))
    monkeypatch.setattr("zif_amd.software.triton_version", lambda: installed["triton"])
    monkeypatch.setattr("zif_amd.notes.installed_version", lambda name: None)
    return installed
