"""The platform on faked machines: its devices, what it refuses and why, what a plan says, what discovery imports."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zif.contract import Feature, FullAttentionSpec, Plan, Refusal, Workload
from zif.plugins import PlatformRegistry
from zif_nvidia.claims import CONTEXT_BYTES
from zif_nvidia.platform import NvidiaPlatform

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[3]
WORKLOAD = Workload(
    dtype="bfloat16",
    kv_specs=(FullAttentionSpec((0, 1), 2, 64, 16, "bfloat16"),),
    head_sizes=(64,),
    features=frozenset({Feature.ATTENTION_SOFTCAP}),
    weight_bytes=GIB,
    activation_bytes=GIB // 8,
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=512,
)
HALF = replace(WORKLOAD, dtype="float16", kv_specs=(FullAttentionSpec((0, 1), 2, 64, 16, "float16"),))


@pytest.fixture
def platform(versions, nvml):
    """Make the platform of a machine with these cards, where software fits unless `versions` is changed."""
    return lambda *cards, **options: NvidiaPlatform(load=lambda: nvml(*cards, **options))


def test_gpus_are_devices(platform):
    probe = platform("H100", "RTX 4090").probe()
    first, second = probe.devices
    assert (first.device_id, first.architecture, first.memory_bytes) == ("cuda:0", "sm_90", 80 * GIB)
    assert first.available_bytes == 79 * GIB - CONTEXT_BYTES
    assert (second.device_id, second.architecture) == ("cuda:1", "sm_89")
    assert dict(first.runtime)["driver"] == "580.65.06 (CUDA 13.0)"
    assert not first.simulated
    assert probe.simulation == ()
    assert first.capabilities.graph_capture


def test_hidden_gpus_are_not_counted(platform, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (device,) = platform("H100", "RTX 4090").probe().devices
    assert (device.device_id, device.architecture) == ("cuda:0", "sm_89")


def test_an_empty_variable_is_a_reason_of_its_own(platform, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    probe = platform("H100").probe()
    assert "CUDA_VISIBLE_DEVICES is set and empty" in probe.reason
    assert probe.simulation == (("TRITON_INTERPRET", "1"),)


def test_without_a_driver_the_interpreter_is_offered_for_tests(platform):
    probe = platform(init_error=12).probe()
    assert probe.devices == ()
    assert "the driver" in probe.reason
    assert probe.reason.endswith("TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests")
    assert probe.simulation == (("TRITON_INTERPRET", "1"),)
    assert platform(init_error=12).plan(WORKLOAD) == Refusal("nvidia", (probe.reason,))


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"torch": None, "cuda": ()}, {}, "install torch>=2.8"),
        ({"torch": "2.7.1"}, {}, "torch 2.7.1 is too old"),
        ({"torch": "2.9.0+cpu", "cuda": ()}, {}, "build that is, cu130"),
        ({"torch": "2.9.0+rocm6.4", "cuda": ()}, {"cuda": 12080}, "build that is, cu128"),
        ({"torch": "2.9.0+rocm6.4", "cuda": ()}, {"cuda": 12020}, "torch 2.9.0+rocm6.4 is not built for CUDA"),
        ({"triton": None}, {}, "install triton 3.6 to 3.9"),
        ({}, {"driver": "470.82", "cuda": 11040}, "470.82 is too old for torch 2.9.0+cu128, built for CUDA 12.8"),
        ({"cuda": (13, 0)}, {"driver": "570.26", "cuda": 12080}, "needs 580.65.06 or later"),
    ],
)
def test_software_that_does_not_fit_is_a_reason_with_a_next_step(platform, versions, changes, options, said):
    versions |= changes
    probe = platform("H100", **options).probe()
    assert probe.devices == ()
    assert said in probe.reason


@pytest.mark.parametrize(
    ("driver", "cuda", "noted"),
    [("535.54.03", 12020, True), ("570.26", 12080, False), ("580.65.06", 13000, False), ("", 0, False)],
)
def test_a_driver_of_an_older_minor_version_works_and_is_noted(platform, driver, cuda, noted):
    plan = platform("H100", driver=driver, cuda=cuda).plan(WORKLOAD)
    assert isinstance(plan, Plan)
    assert any("driver 570.26 has all of it" in note for note in plan.notes) == noted


def test_a_compatibility_library_makes_an_old_driver_serve(platform, versions):
    """It is the library that says which CUDA is served, not the driver below it."""
    versions["cuda"] = (13, 0)
    assert platform("H100", driver="535.54.03", cuda=13000).probe().devices


@pytest.mark.parametrize(
    ("card", "changes", "said"),
    [
        ("P100", {}, "sm_60 is too old: Triton compiles for sm_70 and later"),
        (("H100", {"capability": (15, 0)}), {}, "sm_150 is not known"),
        ("RTX 5090", {"cuda": (12, 6)}, "needs a build of torch for CUDA 12.8 or later"),
        ("V100", {"cuda": (13, 0)}, "needs a build of torch for CUDA 12 or earlier"),
        (("H100", {"capability": (11, 0)}), {"cuda": (13, 0)}, "sm_110 needs triton 3.7 or later"),
        (("H100", {"mode": 3, "pids": (1,)}), {}, "another process has it for itself"),
        (("A100", {"parts": ()}), {}, "no instance was made"),
    ],
)
def test_gpus_that_are_not_served_are_left_out_with_the_reason(platform, versions, card, changes, said):
    versions |= changes
    alone = platform(card).probe()
    assert alone.devices == ()
    assert said in alone.reason
    beside = platform(card, "RTX 4090").probe()
    assert [device.device_id for device in beside.devices] == ["cuda:1"], "the place among CUDA's devices is kept"
    assert any(said in step for step in beside.steps)


def test_an_instance_of_a_divided_gpu_is_a_device(platform):
    (device,) = platform(("A100", {"parts": ("slice",)})).probe().devices
    assert (device.memory_bytes, dict(device.runtime)["UUID"]) == (40 * GIB, "MIG-aaaa")


def test_others_at_work_are_told(platform):
    found = platform(("H100", {"pids": (1, 2), "busy": 80}))
    facts = dict(found.probe().devices[0].runtime)
    assert (facts["other processes"], facts["busy"]) == ("2", "80 %")
    assert any("2 other processes" in note for note in found.plan(WORKLOAD).notes)


def test_a_plan_names_what_serves(platform):
    plan = platform("H100").plan(WORKLOAD)
    assert isinstance(plan, Plan)
    assert plan.device_id == "cuda:0"
    served = dict(plan.implementations)
    assert served["communicator"] == "zif_nvidia.collectives.NcclGroups"
    assert plan.notes[0].startswith("sm_90: wgmma matrix instructions, 227 KiB")
    assert "fp8 in hardware" in plan.notes[0]


@pytest.mark.parametrize(("card", "name"), [("T4", "sm_75"), ("V100", "sm_70")])
def test_bfloat16_is_refused_where_the_hardware_has_none(platform, card, name):
    refusal = platform(card).plan(WORKLOAD)
    assert isinstance(refusal, Refusal)
    assert refusal.reasons[0].startswith(f"{name} (")
    assert "set dtype to float16" in refusal.reasons[0]
    plan = platform(card).plan(HALF)
    assert isinstance(plan, Plan)
    assert any("one by one" in note for note in plan.notes)


@pytest.mark.parametrize("card", ["A100", "RTX 4090", "H100", "RTX 5090"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_dtypes_are_served_from_sm_80_on(platform, card, dtype):
    workload = replace(WORKLOAD, dtype=dtype, kv_specs=(FullAttentionSpec((0,), 2, 64, 32, dtype),))
    assert isinstance(platform(card).plan(workload), Plan)


def test_what_is_too_large_is_refused_with_the_bytes(platform):
    refusal = platform("T4").plan(replace(HALF, weight_bytes=20 * GIB))
    assert isinstance(refusal, Refusal)
    assert "available 14.50 GiB" in refusal.reasons[0]


def test_a_simulated_device_is_taken_by_those_only_who_name_it(platform, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert platform().probe().devices[0].simulated
    assert PlatformRegistry.discover().select(None).name != "nvidia"


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_discovery_and_probe_import_no_array_library(interpreted):
    heavy = "torch", "numpy", "triton", "psutil"
    code = (
        "import sys; from zif_nvidia.plugin import zif_platform; loaded = 'pynvml' in sys.modules;"
        f"zif_platform().probe(); print([m for m in {heavy!r} if m in sys.modules], loaded)"
    )
    path = os.pathsep.join(str(ROOT / room) for room in ("plugins/nvidia/src", "core/src"))
    environ = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "[] False"
