"""Opening: what torch must see first, and the interpreter as a whole device."""

import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from zif.errors import PlatformUnavailableError
from zif_amd.collectives import RcclGroups
from zif_amd.device import prepare
from zif_amd.platform import AmdPlatform

SOURCES = [Path(__file__).parents[1] / "src"]


@pytest.fixture
def info(machine, versions):
    """The first of a machine's two GPUs."""
    machine.add_driver()
    machine.add("MI300X")
    machine.add("MI300X")
    return AmdPlatform(machine.root).probe().devices[0]


@pytest.fixture
def rocm(monkeypatch):
    """A torch that drives these GPUs; tests change its answers."""
    torch_says = {"hip": "7.1.0", "count": 2, "architecture": "gfx942:sramecc+:xnack-", "built": ["gfx90a", "gfx942"]}
    monkeypatch.setattr(torch.version, "hip", torch_says["hip"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_says["count"] > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_says["count"])
    seen = types.SimpleNamespace
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: seen(gcnArchName=torch_says["architecture"]))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: torch_says["built"])
    return torch_says


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 0}, "sees 0 devices, so not 'cuda:0', although the driver lists it"),
        ({"architecture": "gfx1100"}, "torch takes 'cuda:0' for gfx1100, and the driver for gfx942"),
        ({"built": ["gfx90a", "gfx1100"]}, "holds no code for gfx942, only for gfx90a, gfx1100"),
    ],
)
def test_torch_must_see_what_the_driver_lists(info, rocm, changes, reason):
    rocm |= changes
    with pytest.raises(PlatformUnavailableError, match=reason):
        prepare(info)


def test_a_torch_that_knows_no_rocm_opens_nothing(info, rocm, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(PlatformUnavailableError, match="not built for ROCm"):
        prepare(info)


def test_a_gpu_that_torch_sees_as_the_driver_does_is_opened_with_rccl_and_its_tables(info, rocm):
    parts = AmdPlatform()._parts()
    parts.prepare(info)
    assert isinstance(parts.make_groups(info.device_id), RcclGroups)
    assert parts.read_tuning(info.architecture).kernels()


def _run(code, *arguments, **variables):
    """Run code in a process of its own, because triton's mode is a process's."""
    paths = os.pathsep.join([*map(str, SOURCES), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_interpreter_is_a_device(tmp_path):
    said = _run(
        """
        import sys, torch
        from zif.contract import CommunicatorGroup, FullAttentionSpec, Workload
        from zif_amd.platform import AmdPlatform

        spec = FullAttentionSpec((0,), 2, 16, 16, "float32")
        platform = AmdPlatform()
        plan = platform.plan(Workload("float32", (spec,), (16,), frozenset(), 1, 1, 64, 1, 16))
        device = platform.open(plan, 0)
        x = torch.randn(3, 64)
        normal = device.ops.rms_norm(x, torch.ones(64), 1e-5, 0.0)
        torch.testing.assert_close(normal, torch.nn.functional.rms_norm(x, (64,), eps=1e-5))
        group = CommunicatorGroup("alone", 0, 1, f"file://{sys.argv[1]}", 20.0)
        total = device.communicator(group).all_reduce(torch.ones(2)).tolist()
        attention = type(device.attention).__name__
        print(plan.device_id, device.array_device, attention, device.health(5.0).healthy, total)
        device.close()
        """,
        str(tmp_path / "meet"),
        TRITON_INTERPRET="1",
    )
    assert said == "interpreter cpu PagedAttention True [1.0, 1.0]"
