"""A vendor of nothing: its GPUs are those that a test names, and its software is what a test says is installed."""

from dataclasses import dataclass, field

import pytest

from zif.accelerator.gpu.claims import ServedGpu
from zif.accelerator.gpu.platform import GpuPlatform, LeftOut, Survey
from zif.accelerator.gpu.software import GpuSoftware

GIB = 1 << 30


def gpu(architecture="arch1", **changes):
    """Return a GPU that is served."""
    return ServedGpu("Some GPU", architecture, 80 * GIB, 79 * GIB, (("driver", "1.0"), ("partition", "")), **changes)


@dataclass
class Machine:
    """What is found. `asked` notes that GPUs were looked for."""

    found: list = field(default_factory=list)
    problem: str = ""
    torch: str | None = "2.9.0"
    triton: str | None = "3.6.0"
    asked: int = 0


class SomePlatform(GpuPlatform):
    """A vendor's platform at its smallest."""

    name = "some"
    vendor = "someone"
    device_kind = "meta"
    communicator = "someone.Groups"

    def __init__(self, root, machine, parts=None):
        super().__init__(root)
        self.machine, self.parts = machine, parts

    def _software(self):
        return GpuSoftware("Toolkit", self.machine.torch, (12, 8), self.machine.triton)

    def _survey(self, software):
        self.machine.asked += 1
        found = [LeftOut(one) if isinstance(one, str) else one for one in self.machine.found]
        return Survey(("looked",), tuple(found), self.machine.problem)

    def _notes(self, workload, device):
        yield f"{device.architecture} computes {workload.dtype}"

    def _advice(self, workload, device):
        return ("try float32",) if workload.dtype == "float64" else ()

    def _parts(self):
        return self.parts


@pytest.fixture
def machine(monkeypatch):
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return Machine()


@pytest.fixture
def platform(tmp_path, machine):
    """The platform of a host with 16 GiB, of which 8 are free."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {GIB >> 6} kB\nMemAvailable: {GIB >> 7} kB\n")
    return SomePlatform(tmp_path, machine)


@pytest.fixture
def make_gpu():
    return gpu
