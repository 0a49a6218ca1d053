"""Machines as stand-ins for the module of nvidia-ml-py, for tests without a GPU; and installed versions."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

GIB = 1 << 30
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "TRITON_INTERPRET", "OMP_NUM_THREADS")


class NVMLError(Exception):
    """What the module raises: `value` is the code."""

    def __init__(self, value):
        super().__init__(f"error {value}")
        self.value = value


@dataclass(frozen=True)
class Card:
    """One GPU, or with a `uuid` that begins with MIG an instance of one. `fails` names calls that do not work."""

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    memory_bytes: int = 80 * GIB
    free_bytes: int = 79 * GIB
    uuid: str = "GPU-11111111-aaaa"
    mode: int = 0
    pids: tuple[int, ...] = ()
    busy: int = 0
    parts: tuple["Card", ...] | None = None
    fails: tuple[str, ...] = ()


CARDS = {
    "H100": Card(),
    "H100 too": Card(uuid="GPU-12222222-bbbb"),
    "T4": Card("Tesla T4", (7, 5), 16 * GIB, 15 * GIB, "GPU-75757575-cccc"),
    "V100": Card("Tesla V100", (7, 0), 32 * GIB, 31 * GIB, "GPU-70707070-dddd"),
    "P100": Card("Tesla P100", (6, 0), 16 * GIB, 16 * GIB, "GPU-60606060-eeee"),
    "RTX 4090": Card("GeForce RTX 4090", (8, 9), 24 * GIB, 23 * GIB, "GPU-89898989-ffff"),
    "RTX 5090": Card("GeForce RTX 5090", (12, 0), 32 * GIB, 31 * GIB, "GPU-c0c0c0c0-ffff"),
    "A100": Card("NVIDIA A100", (8, 0), 80 * GIB, 79 * GIB, "GPU-80808080-ffff"),
    "slice": Card("NVIDIA A100 MIG 3g.40gb", (8, 0), 40 * GIB, 39 * GIB, "MIG-aaaa"),
    "slice too": Card("NVIDIA A100 MIG 3g.40gb", (8, 0), 40 * GIB, 39 * GIB, "MIG-bbbb"),
}


@dataclass
class Nvml:
    """The module. Handles are cards; what a card's `fails` or `missing` names is not supported."""

    cards: tuple[Card, ...] = ()
    driver: str | bytes = "580.65.06"
    cuda: int = 13000
    init_error: int = 0
    missing: tuple[str, ...] = ()
    calls: list = field(default_factory=list)

    NVMLError = NVMLError

    def __getattribute__(self, name):
        if name.startswith("nvml"):
            if name in object.__getattribute__(self, "missing"):
                raise AttributeError(name)
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def nvmlInit(self):
        if self.init_error:
            raise NVMLError(self.init_error)

    def nvmlShutdown(self): ...

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self.cuda

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._card("handle", self.cards[index])

    def nvmlDeviceGetCudaComputeCapability(self, card):
        return card.capability

    def nvmlDeviceGetMemoryInfo(self, card):
        card = self._card("memory", card)
        return SimpleNamespace(total=card.memory_bytes, free=card.free_bytes, used=card.memory_bytes - card.free_bytes)

    def nvmlDeviceGetName(self, card):
        return card.name.encode()

    def nvmlDeviceGetUUID(self, card):
        return card.uuid

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        return [SimpleNamespace(pid=pid) for pid in self._card("processes", card).pids]

    def nvmlDeviceGetUtilizationRates(self, card):
        return SimpleNamespace(gpu=self._card("utilization", card).busy)

    def nvmlDeviceGetComputeMode(self, card):
        return self._card("mode", card).mode

    def nvmlDeviceGetMigMode(self, card):
        if card.parts is None:
            raise NVMLError(3)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, place):
        if place >= len(card.parts):
            raise NVMLError(6)
        return card.parts[place]

    def _card(self, call, card):
        if call in card.fails:
            raise NVMLError(15 if call == "handle" else 3)
        return card


def _card(name, **changes):
    """Return a card by its name; names of instances in `parts` stand for these."""
    if "parts" in changes:
        changes["parts"] = tuple(CARDS[part] for part in changes["parts"])
    return replace(CARDS[name], **changes)


@pytest.fixture
def nvml():
    """Make the module of a machine: its cards by name, or as pairs of a name and what is changed, and its driver."""

    def make(*cards, **options):
        chosen = [(card, {}) if isinstance(card, str) else card for card in cards]
        return Nvml(tuple(_card(name, **changes) for name, changes in chosen), **options)

    return make


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by package, those that fit unless a test changes them; "cuda" is what torch is built for."""
    installed = {"torch": "2.9.0+cu128", "triton": "3.6.0", "cuda": (12, 8)}
    monkeypatch.setattr("zif_nvidia.software.installed_version", installed.get)
    monkeypatch.setattr("zif_nvidia.software.cuda_of_torch", lambda _: installed["cuda"])
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return installed
