"""The CPU platform: what it finds on faked machines, how it plans, and what it imports."""

import subprocess
import sys
from dataclasses import replace

import pytest

from zif.contract import (
    Feature,
    FullAttentionSpec,
    Outcome,
    Plan,
    Refusal,
    SlidingWindowSpec,
    Workload,
    slab_arena,
)
from zif.errors import PlatformUnavailableError
from zif.host.attention import TiledAttention
from zif_cpu.platform import CpuPlatform

GIB = 1 << 30
CPUINFO = (
    "processor : 0\nmodel name : Some Processor\nflags : fpu avx2 avx512f amx_bf16\n\nprocessor : 1\nflags : fpu\n"
)
MEMINFO = f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\n"
FULL = FullAttentionSpec((0, 1), 2, 64, 16, "bfloat16")
WORKLOAD = Workload(
    dtype="bfloat16",
    kv_specs=(FULL,),
    head_sizes=(64,),
    features=frozenset({Feature.ATTENTION_FULL}),
    weight_bytes=GIB,
    activation_bytes=GIB // 8,
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=512,
)


@pytest.fixture
def machine(tmp_path):
    """A function that fakes files of a machine with 8 GiB, 6 of them available, and returns its root."""

    def build(**files):
        known = {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, "proc/self/cgroup": ""}
        for name, text in {**known, **{n.replace("__", "/"): t for n, t in files.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


def _write(root, folder, **files):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text)


def test_the_probe_names_one_device(machine):
    probe = CpuPlatform(machine()).probe()
    (device,) = probe.devices
    assert (device.device_id, device.name, device.memory_bytes) == ("cpu", "Some Processor", 8 * GIB)
    assert dict(device.runtime)["instruction set"] == "avx2 avx512f amx_bf16"
    assert [n.storage for n in device.capabilities.dtypes] == ["float32", "bfloat16", "float16"]
    assert any(step.startswith("torch: ") for step in probe.steps)


@pytest.mark.parametrize(
    ("version", "reason"), [("2.7.1+cpu", "too old"), ("1.13.0", "too old"), (None, "not installed")]
)
def test_without_a_usable_torch_there_is_no_device_but_a_reason(machine, monkeypatch, version, reason):
    monkeypatch.setattr("zif_cpu.platform.installed_version", lambda _: version)
    platform = CpuPlatform(machine())
    assert platform.probe().devices == ()
    assert reason in platform.probe().reason
    refusal = platform.plan(WORKLOAD)
    assert isinstance(refusal, Refusal)
    assert refusal.reasons == (platform.probe().reason,)
    plan = CpuPlatform(machine()).plan(WORKLOAD)
    with pytest.raises(PlatformUnavailableError, match=reason):
        platform.open(plan, 0)


def _python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_discovery_and_probe_import_no_array_library():
    code = (
        "import sys; from zif_cpu.plugin import zif_platform; zif_platform().probe();"
        "print([m for m in ('torch', 'numpy', 'psutil', 'zif.reference') if m in sys.modules])"
    )
    assert _python(code) == "[]"


def test_a_missing_torch_is_a_reason_not_an_exception():
    code = (
        "import sys; sys.modules['torch'] = None; from zif_cpu.platform import CpuPlatform;"
        "print(CpuPlatform().probe().reason)"
    )
    assert "torch is not installed" in _python(code)


def test_a_plan_says_what_serves_and_what_is_emulated(machine, monkeypatch):
    monkeypatch.setenv("ZIF_CPU_ISA", "torch")
    features = frozenset({Feature.ATTENTION_FULL, Feature.MIXTURE_OF_EXPERTS})
    plan = CpuPlatform(machine()).plan(replace(WORKLOAD, features=features))
    decisions = {d.feature: d for d in plan.decisions}
    assert decisions["attention.full"].detail == "zif.host.attention.TiledAttention"
    assert decisions["moe"].outcome is Outcome.EMULATED
    assert plan.kv_groups[0].layout == TiledAttention().kv_layout(FULL)
    assert dict(plan.implementations)["ops"] == "zif.reference.ops.ReferenceOps"


def test_a_plan_warns_of_a_dtype_that_the_processor_lacks(machine):
    root = machine()
    assert not any("no bfloat16" in note for note in CpuPlatform(root).plan(WORKLOAD).notes)
    (root / "proc/cpuinfo").write_text("flags : avx2\n")
    assert any("no bfloat16" in note for note in CpuPlatform(root).plan(WORKLOAD).notes)


def test_too_large_a_model_is_refused_with_bytes(machine):
    refusal = CpuPlatform(machine()).plan(replace(WORKLOAD, weight_bytes=7 * GIB))
    assert isinstance(refusal, Refusal)
    assert f"weights 7.00 GiB ({7 * GIB} bytes)" in refusal.reasons[0]
    assert f"available 6.00 GiB ({6 * GIB} bytes)" in refusal.reasons[0]


def test_unsupported_head_sizes_and_parallelism_are_refused(machine):
    refusal = CpuPlatform(machine()).plan(replace(WORKLOAD, head_sizes=(1024,), tensor_parallel_size=2))
    assert any("head size 1024" in reason for reason in refusal.reasons)
    assert any("parallel.tensor" in reason for reason in refusal.reasons)


def test_window_groups_get_an_arena_that_holds_both(machine):
    sliding = SlidingWindowSpec((2, 3, 4), 2, 64, 16, "bfloat16", window=256)
    plan = CpuPlatform(machine()).plan(replace(WORKLOAD, kv_specs=(FULL, sliding)))
    assert isinstance(plan, Plan)
    arena = slab_arena(plan.memory.kv_bytes, plan.kv_groups)
    assert [group.spec for group in arena.groups] == [FULL, sliding]
    sizes = [group.layout.block_bytes for group in arena.groups]
    assert all(arena.slab_bytes % size == 0 for size in sizes)
