"""The AMD platform on faked machines: devices, reasons, the plan for each architecture, what probing imports."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from zif.contract import Feature, FullAttentionSpec, Plan, Refusal, Workload
from zif_amd.platform import AmdPlatform
from zif_amd.software import rocm_of_torch, triton_version

GIB = 1 << 30
HINT = "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
WORKLOAD = Workload(
    dtype="bfloat16",
    kv_specs=(FullAttentionSpec((0, 1), 2, 64, 16, "bfloat16"),),
    head_sizes=(64,),
    features=frozenset({Feature.ATTENTION_SOFTCAP, Feature.MIXTURE_OF_EXPERTS}),
    weight_bytes=GIB,
    activation_bytes=GIB // 8,
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=512,
)


@pytest.fixture
def platform(machine, versions):
    machine.add_driver()
    return AmdPlatform(machine.root)


def test_a_gpu_is_a_device(machine, platform):
    machine.add("MI300X")
    probe = platform.probe()
    (device,) = probe.devices
    assert (device.device_id, device.name, device.architecture) == ("cuda:0", "AMD Instinct MI300X OAM", "gfx942")
    assert (device.memory_bytes, device.available_bytes, device.simulated) == (192 * GIB, 191 * GIB, False)
    facts = dict(device.runtime)
    assert facts == {
        "torch": "2.11.0+rocm7.1",
        "ROCm": "7.1",
        "triton": "3.6.0",
        "driver": "amdgpu 6.14.14",
        "PCI": "0000:01:00.0 0x74a1",
        "partition": "SPX/NPS1",
    }
    assert (probe.reason, probe.simulation) == ("", ())


@pytest.mark.parametrize(
    ("card", "name", "said"),
    [
        ("MI300X", "gfx942", "waves of 64, MFMA matrix instructions, 64 KiB of LDS, fp8 of the kind FNUZ"),
        ("MI250", "gfx90a", "waves of 64, MFMA matrix instructions, 64 KiB of LDS, no fp8"),
        ("MI350", "gfx950", "waves of 64, MFMA matrix instructions, 160 KiB of LDS, fp8 of the kind OCP"),
        ("RX7900", "gfx1100", "waves of 32, WMMA matrix instructions, 64 KiB of LDS, no fp8"),
        ("RX9070", "gfx1201", "waves of 32, WMMA matrix instructions, 64 KiB of LDS, fp8 of the kind OCP"),
    ],
)
def test_each_architecture_is_planned_and_described(machine, platform, card, name, said):
    machine.add(card)
    plan = platform.plan(WORKLOAD)
    assert isinstance(plan, Plan), plan
    assert plan.device_id == "cuda:0"
    assert f"{name}: {said}" in plan.notes
    assert any("tables" in note for note in plan.notes)
    served = dict(plan.implementations)
    assert served["communicator"] == "zif_amd.collectives.RcclGroups"


def test_unnamed_boards_are_named_by_their_architecture(machine, platform):
    machine.add("RX9070")
    assert platform.probe().devices[0].name == "AMD Radeon RX 9070, AI PRO R9700"


@pytest.mark.parametrize(
    ("card", "dtype", "cost"),
    [
        ("RX7900", "float32", "multiplies float32 without matrix instructions"),
        ("MI300X", "bfloat16", "rounds to bfloat16 in several integer operations"),
        ("MI350", "bfloat16", None),
        ("MI300X", "float16", None),
    ],
)
def test_what_a_dtype_costs_is_a_note(machine, platform, card, dtype, cost):
    machine.add(card)
    spec = FullAttentionSpec((0, 1), 2, 64, 16, dtype)
    notes = platform.plan(replace(WORKLOAD, dtype=dtype, kv_specs=(spec,))).notes
    costs = [note for note in notes if dtype in note]
    assert len(costs) == (cost is not None)
    assert all(cost in note for note in costs)


def test_waves_per_eu_of_the_tables_are_a_note(machine, platform, tmp_path, monkeypatch):
    machine.add("MI300X")
    rule = '{"tiles": {}, "options": {"waves_per_eu": %d}}'
    machine.write({"tables/gfx942/one.json": f'{{"some_kernel": [{rule % 2}, {rule % 1}], "other": [{{}}]}}'})
    monkeypatch.setattr("zif_amd.tables._FOLDER", tmp_path / "tables")
    assert "tuned with the tables of gfx942; waves per EU: some_kernel asks for 1 or 2" in platform.plan(WORKLOAD).notes
    machine.write({"tables/gfx942/one.json": "{}"})
    assert "tuned with the tables of gfx942; waves per EU: left to the compiler" in platform.plan(WORKLOAD).notes


def test_without_tables_the_portable_ones_serve(machine, platform, tmp_path, monkeypatch):
    machine.add("RX7900")
    monkeypatch.setattr("zif_amd.tables._FOLDER", tmp_path)
    assert "no tuning tables for gfx1100 yet: the portable ones serve" in platform.plan(WORKLOAD).notes


@pytest.mark.parametrize(("modes", "said"), [(("SPX", "NPS1"), "whole GPU"), (("CPX", "NPS4"), "one part of a GPU")])
def test_partitions_are_a_note(machine, platform, modes, said):
    machine.add("MI300X", modes=modes)
    (note,) = [note for note in platform.plan(WORKLOAD).notes if note.startswith("partition")]
    assert f"partition {'/'.join(modes)}: " in note
    assert said in note


@pytest.mark.parametrize(("card", "name"), [("Vega", "gfx906"), ("RX6800", "gfx1030"), ("780M", "gfx1103")])
def test_other_architectures_are_refused_by_name(machine, platform, card, name):
    machine.add(card)
    probe = platform.probe()
    assert probe.devices == ()
    assert f"cuda:0: {name} is not served" in probe.reason
    assert "gfx942" in probe.reason
    assert probe.reason.endswith(HINT)
    assert probe.simulation == (("TRITON_INTERPRET", "1"),)
    assert platform.plan(WORKLOAD) == Refusal("amd", (probe.reason,))


def test_a_gpu_that_is_not_served_keeps_its_number(machine, platform):
    machine.add("780M")
    machine.add("RX7900")
    probe = platform.probe()
    assert [(device.device_id, device.architecture) for device in probe.devices] == [("cuda:1", "gfx1100")]
    assert any(step.startswith("left out: cuda:0: gfx1103") for step in probe.steps)


def test_two_gpus_come_in_the_order_that_the_user_asks_for(machine, platform, monkeypatch):
    machine.add("MI300X")
    machine.add("RX7900")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1,0")
    devices = platform.probe().devices
    assert [(device.device_id, device.architecture) for device in devices] == [
        ("cuda:0", "gfx1100"),
        ("cuda:1", "gfx942"),
    ]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    assert [device.architecture for device in platform.probe().devices] == ["gfx942"]


def test_hidden_gpus_are_a_reason_of_their_own(machine, platform, monkeypatch):
    machine.add("MI300X")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert "HIP_VISIBLE_DEVICES= hides every GPU" in platform.probe().reason
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    assert "HIP_VISIBLE_DEVICES=3 names no GPU; there are 1" in platform.probe().reason


def test_an_assumed_architecture_is_said(machine, platform, monkeypatch):
    machine.add("780M")
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
    (device,) = platform.probe().devices
    assert device.architecture == "gfx1100"
    said = "HSA_OVERRIDE_GFX_VERSION makes the runtime take this gfx1103 for gfx1100"
    assert said in platform.plan(WORKLOAD).notes
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "navi")
    assert "HSA_OVERRIDE_GFX_VERSION='navi'" in platform.probe().reason


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0+cu128", "2.13.0"])
def test_a_torch_for_other_hardware_is_a_reason(machine, platform, versions, torch):
    machine.add("MI300X")
    versions |= {"torch": torch, "rocm": ""}
    reason = platform.probe().reason
    assert (
        f"torch {torch} is not built for ROCm; install the wheel of a build that is, whose version ends in +rocm6.4"
        in reason
    )
    assert reason.endswith(HINT)


def test_without_a_gpu_the_build_of_torch_is_no_matter(machine, platform, versions):
    versions |= {"torch": "2.13.0+cpu", "rocm": ""}
    reason = platform.probe().reason
    assert "lists no GPU" in reason
    assert "torch" not in reason


@pytest.mark.parametrize(
    ("driver", "rocm", "is_old"),
    [
        ("6.8.5", "7.1", True),
        ("6.10.5", "7.1", False),
        ("6.7.0", "7.0", True),
        ("6.8.5", "7.0", False),
        ("6.3.6", "6.4", True),
        ("6.7.0", "6.4", False),
        ("", "7.1", False),
    ],
)
def test_a_driver_too_old_for_the_build_of_torch_names_both(machine, versions, driver, rocm, is_old):
    versions |= {"torch": f"2.9.0+rocm{rocm}", "rocm": rocm}
    machine.add_driver(driver)
    machine.add("MI300X")
    probe = AmdPlatform(machine.root).probe()
    assert bool(probe.devices) is not is_old
    said = f"the amdgpu driver {driver} is too old for torch 2.9.0+rocm{rocm}, built for ROCm {rocm}"
    assert (said in probe.reason) is is_old


def test_a_build_of_torch_older_than_the_architecture(machine, platform, versions):
    machine.add("RX9070")
    versions |= {"torch": "2.8.0+rocm6.3", "rocm": "6.3"}
    assert "gfx1201 needs ROCm 6.4, and torch 2.8.0+rocm6.3 is built for ROCm 6.3" in platform.probe().reason


def test_no_access_is_a_reason_with_the_next_step(machine, platform):
    machine.add("MI300X")
    machine.deny("dev/kfd")
    assert "no access to /dev/kfd; join the group" in platform.probe().reason


def test_without_hardware_the_reason_ends_with_the_interpreter(machine, versions):
    probe = AmdPlatform(machine.root).probe()
    assert probe.reason == f"there is no AMD GPU in this host, and no amdgpu driver; {HINT}"
    assert probe.simulation == (("TRITON_INTERPRET", "1"),)


def test_the_rocm_that_torch_is_built_for_is_read_from_its_file_of_versions(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise AssertionError('imported')")
    versions = tmp_path / "torch/version.py"
    spec = SimpleNamespace(origin=str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    versions.write_text("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482-0f2d60242'\n")
    assert rocm_of_torch() == (6, 4)
    versions.write_text("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\nrocm: Optional[str] = None\n")
    assert rocm_of_torch() == ()
    versions.unlink()
    assert rocm_of_torch() == ()


@pytest.mark.parametrize("distribution", ["triton", "pytorch_triton_rocm", "triton_rocm"])
def test_triton_is_found_under_each_of_its_names(tmp_path, monkeypatch, distribution):
    found = {distribution: "3.6.0"}
    monkeypatch.setattr("zif_amd.software.package_folder", lambda package: tmp_path)
    monkeypatch.setattr("zif_amd.software._distribution_version", found.get)
    assert triton_version() == "3.6.0"
    monkeypatch.setattr("zif_amd.software.package_folder", lambda package: None)
    assert triton_version() is None


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_discovery_and_probe_import_no_library(interpreted):
    code = (
        "import sys; from zif_amd.plugin import zif_platform; zif_platform().probe();"
        "print([m for m in ('torch', 'numpy', 'triton', 'psutil', 'amdsmi') if m in sys.modules])"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_probing_and_planning_on_a_machine_with_a_gpu_import_no_library(machine):
    """Planning names the libraries that it may not need; with a GPU there is more to look at than without."""
    machine.add_driver()
    machine.add("MI300X")
    code = (
        "import sys; from pathlib import Path; import zif_amd.platform as platform;"
        "platform.read_software = lambda: platform.GpuSoftware('ROCm', '2.11.0+rocm7.1', (7, 1), '3.6.0');"
        "probe = platform.AmdPlatform(Path(sys.argv[1])).probe();"
        "assert [device.architecture for device in probe.devices] == ['gfx942'], probe;"
        "print([m for m in ('torch', 'numpy', 'triton', 'psutil', 'amdsmi') if m in sys.modules])"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, str(machine.root)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
