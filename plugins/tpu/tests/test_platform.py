"""The TPU platform: versions that fit or not, chips on faked machines, plans, and what discovery imports."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zif.contract import FullAttentionSpec, Plan, Refusal, SlidingWindowSpec, Workload
from zif.errors import ConfigError, PlatformUnavailableError
from zif_tpu.platform import TpuPlatform
from zif_tpu.settings import read_settings, set_up_process

FULL = FullAttentionSpec((0, 1), 2, 64, 16, "bfloat16")
WORKLOAD = Workload(
    dtype="bfloat16",
    kv_specs=(FULL,),
    head_sizes=(64,),
    features=frozenset(),
    weight_bytes=1 << 20,
    activation_bytes=1 << 20,
    max_model_len=1000,
    max_num_seqs=20,
    max_num_batched_tokens=300,
)
FITTING = {"torch": "2.9.0+cpu", "torch_xla": "2.9.0", "libtpu": "0.0.21"}


@pytest.fixture
def versions(monkeypatch):
    """Installed versions by package, those that fit unless a test changes them."""
    installed = dict(FITTING)
    monkeypatch.setattr("zif_tpu.platform.installed_version", installed.get)
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    return installed


@pytest.fixture
def on_host(versions, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")


@pytest.fixture
def chips(tmp_path):
    """A function that fakes the files of a machine with TPU chips, and returns its root."""

    def build(device="0x0063", count=4, nodes=True):
        for number in range(count):
            folder = tmp_path / f"sys/bus/pci/devices/0000:00:0{number}.0"
            folder.mkdir(parents=True)
            (folder / "vendor").write_text("0x1ae0\n")
            (folder / "device").write_text(device + "\n")
            if nodes:
                (tmp_path / "dev").mkdir(exist_ok=True)
                (tmp_path / f"dev/accel{number}").touch()
        return tmp_path

    return build


def test_versions_that_do_not_fit_are_named_with_the_constraint(versions, on_host):
    versions["torch"] = "2.13.0+cpu"
    probe = TpuPlatform().probe()
    assert probe.devices == ()
    for part in ("2.13.0+cpu", "torch_xla 2.9.0", "torch==2.9.*", "constraints/tpu.txt"):
        assert part in probe.reason
    plan = TpuPlatform().plan(WORKLOAD)
    assert plan == Refusal("tpu", (probe.reason,))


def test_nothing_is_loaded_to_find_out(versions, on_host):
    """A pair that does not fit crashes in a shared library when it is loaded: the answer comes before."""
    code = (
        "import sys; from zif_tpu import platform;"
        "platform.installed_version = {'torch': '2.13', 'torch_xla': '2.9'}.get;"
        "probe = platform.TpuPlatform().probe(); assert 'do not fit' in probe.reason, probe;"
        "print([m for m in ('torch', 'torch_xla', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("missing", "reason"), [("torch_xla", "torch_xla is not installed"), ("torch", "needs it")])
def test_what_is_not_installed_is_named(versions, on_host, missing, reason):
    del versions[missing]
    assert reason in TpuPlatform().probe().reason


def test_without_a_chip_the_way_to_do_without_is_named(versions, tmp_path):
    probe = TpuPlatform(tmp_path).probe()
    assert probe.devices == ()
    assert "no TPU" in probe.reason
    assert "PJRT_DEVICE=CPU" in probe.reason
    assert "device files: none" in probe.steps


def test_chips_are_one_device_with_the_memory_of_their_generation(versions, chips):
    (device,) = TpuPlatform(chips()).probe().devices
    assert (device.device_id, device.name, device.memory_bytes) == ("xla:tpu", "TPU v5e", 16 << 30)
    assert dict(device.runtime)["chips"] == "4"


@pytest.mark.parametrize("fault", ["no libtpu", "no device file", "unknown chip"])
def test_chips_that_cannot_be_used_are_no_device(versions, chips, fault):
    if fault == "no libtpu":
        del versions["libtpu"]
    root = chips(device="0x9999" if fault == "unknown chip" else "0x006f", nodes=fault != "no device file")
    probe = TpuPlatform(root).probe()
    assert probe.devices == ()
    reasons = {"no libtpu": "libtpu", "no device file": "no device files", "unknown chip": "no TPU"}
    assert reasons[fault] in probe.reason


def test_another_pjrt_device_is_refused(versions, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CUDA")
    assert "'CUDA' is neither" in TpuPlatform().probe().reason


def test_shapes_are_constraints_of_the_plan(on_host):
    plan = TpuPlatform().plan(WORKLOAD)
    assert isinstance(plan, Plan)
    assert plan.constraints.token_buckets == (16, 64, 256, 300)
    assert plan.constraints.batch_buckets == (8, 20)
    assert any("programs are compiled before the first request" in note for note in plan.notes)


def test_groups_whose_pages_differ_are_refused_with_their_shapes(on_host):
    other = SlidingWindowSpec((2,), 4, 64, 16, "bfloat16", window=64)
    refusal = TpuPlatform().plan(replace(WORKLOAD, kv_specs=(FULL, other)))
    assert isinstance(refusal, Refusal)
    assert "2 heads of 64" in refusal.reasons[0]
    assert "4 heads of 64" in refusal.reasons[0]


def test_tensor_parallel_is_claimed_where_there_are_several_devices(on_host, monkeypatch):
    monkeypatch.setenv("CPU_NUM_DEVICES", "4")
    parallel = replace(WORKLOAD, tensor_parallel_size=2)
    refusal = TpuPlatform().plan(parallel)
    assert any("neither 1 nor the 4 devices" in reason for reason in refusal.reasons)
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")
    plan = TpuPlatform().plan(parallel)
    assert (plan.tensor_parallel_size, plan.decisions[-1].detail) == (2, "zif_tpu.sharding.Sharding")
    refusal = TpuPlatform().plan(replace(WORKLOAD, tensor_parallel_size=3))
    assert any("does not divide the 2 KV heads" in reason for reason in refusal.reasons)
    monkeypatch.setenv("CPU_NUM_DEVICES", "1")
    assert any(reason.startswith("parallel.tensor") for reason in TpuPlatform().plan(parallel).reasons)


def test_ranks_below_zero_do_not_exist(on_host):
    plan = TpuPlatform().plan(WORKLOAD)
    with pytest.raises(PlatformUnavailableError, match="-1"):
        TpuPlatform().open(plan, -1)


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_wrong_deadline_is_an_error(text):
    with pytest.raises(ConfigError, match="ZIF_TPU_COMPILE_DEADLINE_S"):
        read_settings({"ZIF_TPU_COMPILE_DEADLINE_S": text})


def test_settings():
    assert read_settings({"ZIF_TPU_CACHE": "off"}).cache_folder is None
    assert str(read_settings({"XDG_CACHE_HOME": "/c"}).cache_folder) == "/c/zif/xla"
    assert read_settings({"ZIF_TPU_COMPILE_DEADLINE_S": "1.5", "PJRT_DEVICE": "cpu"}).compile_deadline_s == 1.5


def test_the_users_flags_are_kept():
    environ = {"XLA_FLAGS": "--a=b", "PJRT_DEVICE": "cpu"}
    set_up_process("CPU", environ)
    assert environ["PJRT_DEVICE"] == "CPU"
    assert environ["XLA_FLAGS"] == "--a=b --xla_allow_excess_precision=false"
    own = {"XLA_FLAGS": "--xla_allow_excess_precision=true"}
    set_up_process("CPU", own)
    assert own["XLA_FLAGS"] == "--xla_allow_excess_precision=true"
