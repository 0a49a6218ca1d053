"""Opening: what is checked before a kernel is started, and the interpreter as a device."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zif.contract import CommunicatorError, CommunicatorGroup
from zif.errors import PlatformUnavailableError
from zif_nvidia import device as opening
from zif_nvidia.collectives import NcclGroups
from zif_nvidia.platform import NvidiaPlatform
from zif_nvidia.settings import count_as_the_driver_does, let_collectives_fail
from zif_nvidia.tables import read_tuning, tuning_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def info(versions, nvml, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return NvidiaPlatform(load=lambda: nvml("H100")).probe().devices[0]


@pytest.fixture
def seen(monkeypatch):
    """What torch sees: one H100, with the id that the driver tells, and code for three architectures."""
    seen = SimpleNamespace(count=1, archs=["sm_80", "sm_90", "compute_90"], error=None)
    seen.properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, uuid="11111111-aaaa")

    def available():
        if seen.error:
            raise seen.error
        return True

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: seen.properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: seen.archs)
    return seen


def test_a_gpu_that_torch_sees_as_the_driver_does_is_opened_with_nccl_and_its_tables(info, seen):
    parts = NvidiaPlatform()._parts()
    parts.prepare(info)
    assert isinstance(parts.make_groups(info.device_id), NcclGroups)
    assert parts.read_tuning(info.architecture).kernels()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("count", 0), "sees 0 devices, so not 'cuda:0'"),
        (("archs", ["sm_75", "sm_100"]), "holds no code for sm_90, only for sm_75, sm_100"),
        (("properties", SimpleNamespace(name="other", major=9, minor=0, uuid="ffff")), "in different orders"),
        (("properties", SimpleNamespace(name="other", major=8, minor=0, uuid="11111111-aaaa")), "PCI_BUS_ID"),
    ],
)
def test_what_torch_sees_otherwise_is_told(info, seen, change, said):
    setattr(seen, *change)
    with pytest.raises(PlatformUnavailableError, match=said):
        opening.prepare(info)


def test_a_torch_without_cuda_is_told(info, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(PlatformUnavailableError, match="is not built for CUDA"):
        opening.prepare(info)


@pytest.mark.parametrize(
    ("name", "runs"), [("sm_90", True), ("sm_90a", True), ("sm_80", False), ("compute_80", True), ("sm_120", False)]
)
def test_code_runs_within_its_major_version_and_ptx_on_later_ones(name, runs):
    assert opening._runs(name, 90) == runs


def test_what_is_set_for_the_runtimes_leaves_the_users_choice():
    environ = {"TORCH_NCCL_BLOCKING_WAIT": "0"}
    let_collectives_fail(environ)
    count_as_the_driver_does(environ)
    assert environ == {
        "TORCH_NCCL_BLOCKING_WAIT": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    other = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    count_as_the_driver_does(other)
    assert other == {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}


class Group:
    """A stand-in for torch's process group of NCCL: notes what it was made with."""

    made: list = []  # noqa: RUF012

    class Options:
        pass

    def __init__(self, store, rank, size, options):
        Group.made.append((rank, size, options._timeout.total_seconds(), options.is_high_priority_stream))

    def eager_connect_single_device(self, device):
        Group.made.append(str(device))


class Store(dict):
    def wait(self, keys, deadline):
        if missing := [key for key in keys if key not in self]:
            raise RuntimeError(f"no {missing} within {deadline}")

    set = dict.__setitem__


@pytest.fixture
def nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(Group, "made", [])


def _group(rank=0, size=1):
    return CommunicatorGroup("some", rank, size, "file:///nowhere", 7.0)


def test_a_group_is_bound_to_its_device_and_deadline(nccl):
    NcclGroups("cuda:1")(Store({"here/1": "yes"}), _group(0, 2), timedelta(seconds=7))
    assert Group.made == [(0, 2, 7.0, False), "cuda:1"]


def test_a_torch_without_nccl_is_an_error(monkeypatch):
    monkeypatch.delattr(torch.distributed, "ProcessGroupNCCL", raising=False)
    with pytest.raises(CommunicatorError, match="built without NCCL"):
        NcclGroups("cuda:0")(Store(), _group(), timedelta(seconds=7))


def test_tables_serve_where_they_fit(tmp_path):
    for name in ("sm_80", "sm_89", "sm_90", "sm_100"):
        (tmp_path / name).mkdir()
    wanted = {"sm_75": None, "sm_80": "sm_80", "sm_86": None, "sm_87": "sm_80", "sm_89": "sm_89", "sm_90": "sm_90"}
    wanted |= {"sm_103": "sm_100", "sm_110": "sm_100", "sm_120": "sm_89", "sm_121": "sm_89"}
    found = {name: tuning_folder(name, tmp_path) for name in wanted}
    assert {name: folder and folder.name for name, folder in found.items()} == wanted


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_tables_can_be_read(architecture):
    assert "rms_norm" in read_tuning(architecture).kernels()


INTERPRETED = """
from zif.contract import FullAttentionSpec, Workload
from zif_nvidia.plugin import zif_platform

spec = FullAttentionSpec((0,), 2, 64, 16, "float32")
platform = zif_platform()
plan = platform.plan(Workload("float32", (spec,), (64,), frozenset(), 1 << 20, 1 << 20, 64, 2, 64))
device = platform.open(plan, 0)
print(plan.device_id, device.array_device, type(device.attention).__name__, type(device.ops).__name__)
import torch
x = torch.arange(32.0).view(2, 16)
print(torch.allclose(device.ops.rms_norm(x, torch.ones(16), 1e-6, 0.0), x * (x * x).mean(-1, keepdim=True).rsqrt()))
print(device.health(20.0).healthy)
device.close()
"""


def test_the_interpreter_opens_as_a_device_on_the_host():
    pytest.importorskip("triton")
    rooms = (str(ROOT / room) for room in ("plugins/nvidia/src", "core/src"))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(rooms), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environ)
    assert done.stdout.splitlines() == ["interpreter cpu PagedAttention KernelOps", "True", "True"], done.stderr
