"""Opening: what torch and Triton must agree on first, what a GPU is made of, and the interpreter as a whole device."""

import os
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zif.accelerator.graphs import BucketedGraphs
from zif.contract import FullAttentionSpec, Workload
from zif.errors import PlatformUnavailableError
from zif_amd import device as opening
from zif_amd.collectives import RcclGroups
from zif_amd.platform import AmdPlatform

SOURCES = [Path(__file__).parents[1] / "src"]
WORKLOAD = Workload("float32", (FullAttentionSpec((0,), 2, 16, 16, "float32"),), (16,), frozenset(), 1, 1, 64, 1, 16)


@pytest.fixture
def gpus(machine, versions):
    """A machine with two GPUs, and its platform."""
    machine.add_driver()
    machine.add("MI300X")
    machine.add("MI300X")
    return AmdPlatform(machine.root)


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
    monkeypatch.setattr(opening, "_check_triton", lambda *, interpreted: None)
    return torch_says


class _Recorded:
    """Takes the place of what is built from arguments, and keeps them."""

    def __init__(self, *arguments):
        self.arguments = arguments


@pytest.fixture
def parts(monkeypatch):
    """Stand-ins for what needs Triton or a GPU."""
    attention, ops = types.ModuleType("attention"), types.ModuleType("ops")
    attention.PagedAttention = type("PagedAttention", (_Recorded,), {})
    ops.KernelOps = type("KernelOps", (_Recorded,), {})
    monkeypatch.setitem(sys.modules, "zif.kernels.attention", attention)
    monkeypatch.setitem(sys.modules, "zif.kernels.ops", ops)
    monkeypatch.setattr(opening, "AcceleratorDevice", _Recorded)


def test_a_gpu_is_made_of_kernels_graphs_and_rccl(gpus, rocm, parts):
    plan = gpus.plan(WORKLOAD)
    made, rank, services = gpus.open(plan, 0).arguments
    assert (made, rank) == (plan, 0)
    launch, array_device = services.attention.arguments
    assert array_device == "cuda:0"
    assert services.ops.arguments == (launch,)
    assert launch.tuning.kernels()
    assert isinstance(services.make_group, RcclGroups)
    assert isinstance(services.graphs, BucketedGraphs)


def test_each_rank_opens_a_gpu_of_its_own(gpus, rocm, parts):
    made, rank, services = gpus.open(gpus.plan(WORKLOAD), 1).arguments
    assert (made.device_id, rank, services.attention.arguments[1]) == ("cuda:1", 1, "cuda:1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 0}, "sees 0 devices, so not 'cuda:0', although the driver lists it"),
        ({"architecture": "gfx1100"}, "torch takes 'cuda:0' for gfx1100, and the driver for gfx942"),
        ({"built": ["gfx90a", "gfx1100"]}, "holds no code for gfx942, only for gfx90a, gfx1100"),
    ],
)
def test_torch_must_see_what_the_driver_lists(gpus, rocm, parts, changes, reason):
    rocm |= changes
    with pytest.raises(PlatformUnavailableError, match=reason):
        gpus.open(gpus.plan(WORKLOAD), 0)


def test_a_torch_that_knows_no_rocm_opens_nothing(gpus, rocm, parts, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(PlatformUnavailableError, match="not built for ROCm"):
        gpus.open(gpus.plan(WORKLOAD), 0)


def _run(code, *arguments, **variables):
    """Run code in a process of its own, because triton's mode is a process's."""
    paths = os.pathsep.join([*map(str, SOURCES), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_interpreter_must_be_chosen_before_triton_is_imported():
    said = _run(
        """
        import os, triton.language
        os.environ["TRITON_INTERPRET"] = "1"
        from zif_amd.device import open_interpreter
        try:
            open_interpreter(None, 0, 1)
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    assert said.startswith("PlatformUnavailableError triton was imported before TRITON_INTERPRET=1 was set")


def test_a_gpu_is_not_opened_where_triton_interprets():
    said = _run(
        """
        import os, triton.language
        del os.environ["TRITON_INTERPRET"]
        from zif_amd.device import open_gpu
        try:
            open_gpu(None, 0, None)
        except Exception as error:
            print(type(error).__name__, error)
        """,
        TRITON_INTERPRET="1",
    )
    assert said.startswith("PlatformUnavailableError triton was imported while TRITON_INTERPRET was set")


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


def test_memory_that_was_taken_since_the_plan_is_told(gpus):
    plan = gpus.plan(WORKLOAD)
    plan = replace(plan, memory=replace(plan.memory, weight_bytes=1 << 50))
    with pytest.raises(
        PlatformUnavailableError, match="it was taken since; end the processes that use it, or plan again"
    ):
        gpus.open(plan, 0)
