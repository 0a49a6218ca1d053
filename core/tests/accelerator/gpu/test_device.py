"""Opening: what torch and Triton must agree on first, and what a GPU is made of."""

import os
import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zif.accelerator.gpu import device as opening
from zif.accelerator.gpu.claims import gpu_info
from zif.accelerator.gpu.device import GpuParts, check_listed
from zif.accelerator.gpu.software import GpuSoftware
from zif.accelerator.graphs import BucketedGraphs
from zif.contract import FullAttentionSpec, Workload
from zif.errors import DeviceLostError, PlatformUnavailableError
from zif.kernels.tuning import Tuning

WORKLOAD = Workload("float32", (FullAttentionSpec((0,), 2, 16, 16, "float32"),), (16,), frozenset(), 1, 1, 64, 1, 16)


class Recorded:
    """Takes the place of what is built from arguments, and keeps them."""

    def __init__(self, *arguments):
        self.arguments = arguments


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins for what needs Triton or a GPU: two of which torch counts."""
    attention, ops = ModuleType("attention"), ModuleType("ops")
    attention.PagedAttention = type("PagedAttention", (Recorded,), {})
    ops.KernelOps = type("KernelOps", (Recorded,), {})
    monkeypatch.setitem(sys.modules, "zif.kernels.attention", attention)
    monkeypatch.setitem(sys.modules, "zif.kernels.ops", ops)
    monkeypatch.setattr(opening, "AcceleratorDevice", Recorded)
    monkeypatch.setattr(opening, "_check_triton", lambda *, interpreted: None)
    module = SimpleNamespace(Graph=object, is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


@pytest.fixture
def opened(platform, machine, make_gpu, stand_ins):
    """The platform with two GPUs; `prepared` notes for which one a process was prepared."""
    machine.found = [make_gpu(), make_gpu("arch2")]
    prepared = []

    def tuning(architecture):
        prepared.append(architecture)
        return Tuning.read()

    platform.parts = GpuParts(lambda device: prepared.append(device.device_id), tuning, Recorded, "Graph")
    platform.prepared = prepared
    return platform


def test_a_gpu_is_made_of_kernels_graphs_and_the_vendors_parts(opened):
    plan = opened.plan(WORKLOAD)
    made, rank, services = opened.open(plan, 0).arguments
    assert (made, rank) == (plan, 0)
    launch, array_device = services.attention.arguments
    assert array_device == "meta:0"
    assert services.ops.arguments == (launch,)
    assert launch.tuning.kernels()
    assert services.make_group.arguments == ("meta:0",)
    assert isinstance(services.graphs, BucketedGraphs)
    assert opened.prepared == ["meta:0", "arch1"]


def test_each_rank_opens_a_gpu_of_its_own(opened):
    made, rank, services = opened.open(opened.plan(WORKLOAD), 1).arguments
    assert (made.device_id, rank, services.attention.arguments[1]) == ("meta:1", 1, "meta:1")
    assert opened.prepared == ["meta:1", "arch2"]


def test_a_context_that_is_broken_when_it_is_made_is_a_lost_device(opened):
    def broken(device):
        raise RuntimeError("some error: unknown error")

    opened.parts = GpuParts(broken, opened.parts.read_tuning, Recorded, "Graph")
    with pytest.raises(DeviceLostError, match="'meta:0'"):
        opened.open(opened.plan(WORKLOAD), 0)


@pytest.mark.parametrize(("count", "available"), [(1, True), (2, False)])
def test_torch_must_count_what_the_driver_lists(stand_ins, make_gpu, count, available):
    info = gpu_info("meta:1", make_gpu(), GpuSoftware("Toolkit", "2.9.0", (), "3.6.0"), collectives=False)
    check_listed(info, "look there")
    stand_ins.device_count, stand_ins.is_available = lambda: count, lambda: available
    said = f"sees {count * available} devices, so not 'meta:1', although the driver lists it .*; look there"
    with pytest.raises(PlatformUnavailableError, match=said):
        check_listed(info, "look there")


@pytest.mark.parametrize(
    ("kind", "interpreted", "said"),
    [
        ("JITFunction", False, ""),
        ("InterpretedFunction", True, ""),
        ("JITFunction", True, "imported before TRITON_INTERPRET=1"),
        ("InterpretedFunction", False, "unset it before the process starts"),
    ],
)
def test_triton_in_the_other_mode_is_refused(monkeypatch, kind, interpreted, said):
    language = ModuleType("triton.language")
    language.cdiv = type(kind, (), {})()
    package = ModuleType("triton")
    package.language = language
    monkeypatch.setitem(sys.modules, "triton", package)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    if not said:
        opening._check_triton(interpreted=interpreted)
        return
    with pytest.raises(PlatformUnavailableError, match=said):
        opening._check_triton(interpreted=interpreted)


def _said(call, **variables):
    """Run a call that fails in a process of its own, because triton's mode is a process's."""
    code = """
        import os, sys, triton.language
        os.environ["TRITON_INTERPRET"] = "" if os.environ.get("TRITON_INTERPRET") else "1"
        from zif.accelerator.gpu.device import open_gpu, open_interpreter
        try:
            eval(sys.argv[1])
        except Exception as error:
            print(type(error).__name__, error)
        """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", textwrap.dedent(code), call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_must_be_chosen_before_triton_is_imported():
    pytest.importorskip("triton")
    refusal = "PlatformUnavailableError triton was imported before TRITON_INTERPRET=1 was set"
    assert _said("open_interpreter(None, 0, 1)").startswith(refusal)


def test_a_gpu_is_not_opened_where_triton_interprets():
    pytest.importorskip("triton")
    refusal = "PlatformUnavailableError triton was imported while TRITON_INTERPRET was set"
    assert _said("open_gpu(None, 0, None, None)", TRITON_INTERPRET="1").startswith(refusal)
