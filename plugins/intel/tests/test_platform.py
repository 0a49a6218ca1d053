"""The Intel platform on faked machines: its devices, whether IPEX serves, what a plan says, what discovery imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zif.contract import Feature, FullAttentionSpec, Plan, Refusal, Workload
from zif.errors import ConfigError, PlatformUnavailableError
from zif_intel.hardware import read_gpus, read_numa_nodes
from zif_intel.platform import IntelPlatform
from zif_intel.settings import IntelSettings, read_settings

GIB = 1 << 30
CPUINFO = "processor : 0\nmodel name : Some Xeon\nflags : fpu avx2 avx512f avx512_vnni amx_bf16\n"
MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemAvailable: {6 * GIB // 1024} kB\n"
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


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by package, those that fit unless a test changes them."""
    installed = {"torch": "2.8.0+cpu", "intel_extension_for_pytorch": "2.8.0"}
    monkeypatch.setattr("zif_intel.platform.installed_version", installed.get)
    monkeypatch.setattr("zif.host.facts.platform.machine", lambda: "x86_64")
    for name in ("ZIF_INTEL_DEVICE", "ZIF_INTEL_IPEX", "ZIF_INTEL_NUMA_NODE", "ZIF_INTEL_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return installed


@pytest.fixture
def machine(tmp_path):
    """A machine with one processor and no GPU; `write` adds files."""
    _write(tmp_path, {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, "proc/self/cgroup": ""})
    return tmp_path


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _add_gpu(root, number=0, memory=16 * GIB, driver="xe"):
    card = f"sys/class/drm/card{number}"
    _write(root, {f"{card}/device/vendor": "0x8086\n", f"{card}/device/device": "0x56a0\n"})
    _write(root, {f"{card}/device/class": "0x030000\n"})
    if memory:
        _write(root, {f"{card}/lmem_total_bytes": f"{memory}\n"})
    if driver:
        (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (root / card / "device/driver").symlink_to(root / "drivers" / driver)


def test_the_host_is_a_device_and_ipex_serves(versions, machine):
    probe = IntelPlatform(machine).probe()
    (device,) = probe.devices
    assert (device.device_id, device.name, device.memory_bytes) == ("cpu", "Some Xeon", 8 * GIB)
    assert dict(device.runtime)["ipex"] == "2.8.0"
    assert "GPUs: none" in probe.steps
    plan = IntelPlatform(machine).plan(WORKLOAD)
    assert isinstance(plan, Plan)
    assert dict(plan.implementations)["attention"] == "zif_intel.ipex_attention.IpexAttention"


@pytest.mark.parametrize(
    ("torch", "ipex", "setting", "reason"),
    [
        ("2.13.0+cpu", "2.8.0", "", "intel_extension_for_pytorch 2.8.0 needs torch==2.8.*, and torch is 2.13.0+cpu"),
        ("2.13.0", None, "", "intel_extension_for_pytorch is not installed"),
        ("2.8.0", "2.8.0", "off", "ZIF_INTEL_IPEX is off"),
    ],
)
def test_without_ipex_the_plan_says_what_is_lost(versions, machine, monkeypatch, torch, ipex, setting, reason):
    versions |= {"torch": torch, "intel_extension_for_pytorch": ipex}
    monkeypatch.setenv("ZIF_INTEL_IPEX", setting)
    platform = IntelPlatform(machine)
    assert reason in dict(platform.probe().devices[0].runtime)["ipex"]
    plan = platform.plan(WORKLOAD)
    assert any(reason in note and "torch's own operations" in note for note in plan.notes)
    assert dict(plan.implementations)["attention"] == "zif.host.attention.TiledAttention"


@pytest.mark.parametrize("torch", [None, "2.7.1"])
def test_without_a_usable_torch_there_is_no_device_but_a_reason(versions, machine, torch):
    versions["torch"] = torch
    platform = IntelPlatform(machine)
    assert platform.probe().devices == ()
    assert "install torch>=2.8" in platform.probe().reason
    assert platform.plan(WORKLOAD) == Refusal("intel", (platform.probe().reason,))


@pytest.mark.parametrize("fault", ["no AVX2", "another architecture"])
def test_processors_that_are_not_served_are_named(versions, machine, monkeypatch, fault):
    if fault == "no AVX2":
        (machine / "proc/cpuinfo").write_text("flags : fpu sse4_2\n")
    else:
        monkeypatch.setattr("zif.host.facts.platform.machine", lambda: "aarch64")
    probe = IntelPlatform(machine).probe()
    assert probe.devices == ()
    assert "the platform 'cpu' serves it" in probe.reason


def test_gpus_come_first_where_torch_drives_them(versions, machine):
    versions["torch"] = "2.9.0+xpu"
    _add_gpu(machine, 0)
    _add_gpu(machine, 1, memory=8 * GIB)
    devices = IntelPlatform(machine).probe().devices
    assert [(device.device_id, device.memory_bytes) for device in devices] == [
        ("xpu:0", 16 * GIB),
        ("xpu:1", 8 * GIB),
        ("cpu", 8 * GIB),
    ]
    plan = IntelPlatform(machine).plan(WORKLOAD)
    assert plan.device_id == "xpu:0"
    assert dict(plan.implementations)["attention"] == "zif_intel.gathered.GatheredAttention"


def test_a_gpu_without_a_build_of_torch_for_it_is_a_reason(versions, machine, monkeypatch):
    _add_gpu(machine)
    monkeypatch.setenv("ZIF_INTEL_DEVICE", "xpu")
    probe = IntelPlatform(machine).probe()
    assert probe.devices == ()
    assert "torch 2.8.0+cpu is not a build for them" in probe.reason


def test_without_a_gpu_the_probe_says_so(versions, machine, monkeypatch):
    monkeypatch.setenv("ZIF_INTEL_DEVICE", "xpu")
    versions["torch"] = "2.9.0+xpu"
    assert "no Intel GPU with memory of its own" in IntelPlatform(machine).probe().reason


@pytest.mark.parametrize("fault", ["no driver", "no memory", "another vendor"])
def test_what_is_no_usable_gpu_is_left_out(machine, fault):
    _add_gpu(machine, memory=0 if fault == "no memory" else GIB, driver="" if fault == "no driver" else "i915")
    if fault == "another vendor":
        (machine / "sys/class/drm/card0/device/vendor").write_text("0x1234\n")
    assert read_gpus(machine) == ()


def test_memory_of_a_gpu_is_its_largest_window_where_the_driver_does_not_say(machine):
    _add_gpu(machine, memory=0)
    small, large = "0x4000000000 0x4000ffffff 0x140204", "0x3800000000 0x3bffffffff 0x14220c"
    _write(machine, {"sys/class/drm/card0/device/resource": f"{small}\n{large}\n"})
    assert read_gpus(machine)[0].memory_bytes == 16 * GIB


def test_numa_nodes_are_read_with_their_processors(machine):
    _write(machine, {"sys/devices/system/node/node0/cpulist": "0-1,4\n"})
    _write(machine, {"sys/devices/system/node/node1/cpulist": "2-3\n", "sys/devices/system/node/node2/cpulist": "\n"})
    nodes = read_numa_nodes(machine)
    assert [(node.number, sorted(node.processors)) for node in nodes] == [(0, [0, 1, 4]), (1, [2, 3])]


def test_several_nodes_are_a_note_and_an_unknown_one_an_error(versions, machine, monkeypatch):
    for node in (0, 1):
        _write(machine, {f"sys/devices/system/node/node{node}/cpulist": f"{node}\n"})
    platform = IntelPlatform(machine)
    plan = platform.plan(WORKLOAD)
    assert any("ZIF_INTEL_NUMA_NODE" in note for note in plan.notes)
    monkeypatch.setenv("ZIF_INTEL_NUMA_NODE", "7")
    with pytest.raises(PlatformUnavailableError, match="no NUMA node 7; nodes: 0, 1"):
        platform.open(plan, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ZIF_INTEL_DEVICE", "gpu"),
        ("ZIF_INTEL_IPEX", "maybe"),
        ("ZIF_INTEL_NUMA_NODE", "-1"),
        ("ZIF_INTEL_THREADS", "0"),
    ],
)
def test_wrong_settings_are_errors(name, text):
    with pytest.raises(ConfigError, match=name):
        read_settings({name: text})


def test_settings():
    environ = {"ZIF_INTEL_DEVICE": "CPU", "ZIF_INTEL_NUMA_NODE": "1", "OMP_NUM_THREADS": "3", "ZIF_INTEL_IPEX": "off"}
    assert read_settings(environ) == IntelSettings("cpu", 3, 1, uses_ipex=False)
    assert read_settings({}) == IntelSettings()


def test_ranks_below_zero_do_not_exist(versions, machine):
    with pytest.raises(PlatformUnavailableError, match="-1"):
        IntelPlatform(machine).open(IntelPlatform(machine).plan(WORKLOAD), -1)


def test_discovery_and_probe_import_no_array_library():
    code = (
        "import sys; from zif_intel.plugin import zif_platform; zif_platform().probe();"
        "print([m for m in ('torch', 'numpy', 'psutil', 'intel_extension_for_pytorch') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
