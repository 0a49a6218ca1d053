"""A platform of GPUs whoever makes them: what it offers, what it refuses and why, what it opens for which rank."""

import subprocess
import sys
from dataclasses import replace

import pytest

from zif.contract import Feature, FullAttentionSpec, Plan, Refusal, Workload
from zif.errors import PlatformUnavailableError

GIB = 1 << 30
HINT = "TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
SIMULATION = (("TRITON_INTERPRET", "1"),)


def workload(dtype="bfloat16", **changes):
    spec = FullAttentionSpec((0, 1), 2, 64, 16, dtype)
    plain = Workload(dtype, (spec,), (64,), frozenset({Feature.ATTENTION_SOFTCAP}), GIB, GIB // 8, 4096, 8, 512)
    return replace(plain, **changes)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_gpus_are_devices(platform, machine, make_gpu):
    machine.found = [make_gpu(notes=("slow",)), make_gpu("arch2")]
    probe = platform.probe()
    first, second = probe.devices
    assert (first.device_id, first.name, first.architecture) == ("meta:0", "Some GPU", "arch1")
    assert (first.memory_bytes, first.available_bytes, first.simulated) == (80 * GIB, 79 * GIB, False)
    assert (second.device_id, second.architecture) == ("meta:1", "arch2")
    facts = (("torch", "2.9.0"), ("Toolkit", "12.8"), ("triton", "3.6.0"), ("driver", "1.0"))
    assert first.runtime == facts, "a fact without a value is not told"
    assert first.capabilities.graph_capture
    assert first.capabilities.notes == ("slow",)
    assert [numerics.storage for numerics in first.capabilities.dtypes] == ["float32", "bfloat16", "float16"]
    assert (probe.reason, probe.simulation) == ("", ())
    assert probe.steps[0] == "torch: 2.9.0"
    assert probe.steps[-1] == "looked"


def test_claims_are_less_where_the_hardware_cannot(platform, machine, make_gpu):
    machine.found = [make_gpu(dtypes=("float32",), max_head_size=256)]
    capabilities = platform.probe().devices[0].capabilities
    assert (capabilities.kv_dtypes, capabilities.max_head_size) == (("float32",), 256)


def test_collectives_are_claimed_where_ranks_can_have_a_gpu_each(platform, machine, make_gpu):
    machine.found = [make_gpu(), "too old"]
    assert not platform.probe().devices[0].capabilities.collectives
    machine.found = [make_gpu(), make_gpu()]
    assert all(device.capabilities.collectives for device in platform.probe().devices)


def test_a_gpu_that_is_left_out_keeps_its_number(platform, machine, make_gpu):
    machine.found = ["too old", make_gpu()]
    probe = platform.probe()
    assert [device.device_id for device in probe.devices] == ["meta:1"]
    assert probe.steps[-1] == "left out: meta:0: too old"


def test_reasons_end_with_the_interpreter_for_tests(platform, machine):
    machine.found = ["too old", "too new"]
    probe = platform.probe()
    assert (probe.devices, probe.simulation) == ((), SIMULATION)
    assert probe.reason == f"meta:0: too old; meta:1: too new; {HINT}"
    machine.found, machine.problem = [], "no driver"
    assert platform.probe().reason == f"no driver; {HINT}"
    assert platform.plan(workload()) == Refusal("some", (f"no driver; {HINT}",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": None}, "torch is not installed; install torch>=2.8"),
        ({"torch": "2.7.1"}, "torch 2.7.1 is too old"),
        ({"triton": None}, "triton is not installed; install triton 3.6 to 3.9"),
        ({"triton": "3.5.1"}, "triton 3.5.1 is not supported"),
        ({"triton": "3.10.0"}, "triton 3.10.0 is not supported"),
    ],
)
@pytest.mark.parametrize("interpreted", ["", "1"])
def test_software_that_does_not_fit_is_a_reason_everywhere(
    platform, machine, make_gpu, monkeypatch, changes, said, interpreted
):
    machine.found = [make_gpu()]
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    for name, value in changes.items():
        setattr(machine, name, value)
    probe = platform.probe()
    assert (probe.devices, probe.simulation) == ((), ()), "it would find no device either"
    assert said in probe.reason


@pytest.mark.parametrize("version", ["3.6.0", "3.9.1", "3.7.0+git1234"])
def test_versions_of_triton_that_serve(platform, machine, make_gpu, version):
    machine.found, machine.triton = [make_gpu()], version
    assert platform.probe().devices


def test_every_reason_is_told_at_once(platform, machine):
    machine.problem, machine.torch, machine.triton = "no driver", "2.7.1", None
    reason = platform.probe().reason
    assert all(said in reason for said in ("no driver", "torch 2.7.1 is too old", "triton is not installed"))


def test_the_interpreter_is_the_only_device_where_it_is_asked_for(platform, machine, make_gpu, interpreted):
    machine.found = [make_gpu()]
    (device,) = platform.probe().devices
    assert machine.asked == 0, "no GPU is looked for"
    assert (device.device_id, device.architecture, device.simulated) == ("interpreter", "interpreter", True)
    assert device.name == "Triton interpreter on the host"
    assert (device.memory_bytes, device.available_bytes) == (4 * GIB, 2 * GIB)
    assert not device.capabilities.graph_capture
    assert device.capabilities.collectives
    assert device.capabilities.block_sizes == (16, 32, 64, 128)


def test_a_plan_names_what_serves(platform, machine, make_gpu):
    machine.found = [make_gpu()]
    plan = platform.plan(workload())
    assert isinstance(plan, Plan)
    assert plan.device_id == "meta:0"
    served = dict(plan.implementations)
    assert served["attention"] == "zif.kernels.attention.PagedAttention"
    assert served["graphs"] == "zif.accelerator.graphs.BucketedGraphs"
    assert served["communicator"] == "someone.Groups"
    assert plan.notes == ("arch1 computes bfloat16",)


def test_a_plan_for_the_interpreter_says_what_it_is(platform, interpreted):
    plan = platform.plan(workload(weight_bytes=1 << 20, activation_bytes=1 << 20))
    assert isinstance(plan, Plan)
    assert plan.notes == ("kernels run in Triton's interpreter on the host: for proofs, not for use",)
    assert dict(plan.implementations)["allocator"] == "zif.host.memory.HostAllocator"
    assert dict(plan.implementations)["communicator"] == "zif.host.gloo.GlooCommunicator"


def test_the_cost_of_emulation_is_stated(platform, machine, make_gpu):
    machine.found = [make_gpu()]
    plan = platform.plan(workload(features=frozenset({Feature.QUANTIZATION_MXFP4_DEQUANTIZED})))
    assert any("four times the bytes" in decision.detail for decision in plan.decisions)


def test_what_is_not_claimed_is_refused_with_the_vendors_advice_first(platform, machine, make_gpu):
    machine.found = [make_gpu()]
    refusal = platform.plan(workload("float64", features=frozenset({Feature.ATTENTION_LATENT})))
    assert isinstance(refusal, Refusal)
    assert refusal.reasons[0] == "try float32"
    assert any("attention.latent" in reason for reason in refusal.reasons)
    assert any("float64" in reason for reason in refusal.reasons)


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (-1, "rank -1 does not exist"),
        (1, "rank 1 needs a GPU of its own, and there are 1 from 'meta:1' on"),
        (5, "rank 5 needs a GPU of its own"),
    ],
)
def test_ranks_without_a_gpu_of_their_own_are_refused(platform, machine, make_gpu, rank, said):
    machine.found = ["too old", make_gpu()]
    with pytest.raises(PlatformUnavailableError, match=said):
        platform.open(platform.plan(workload()), rank)


def test_a_plan_of_another_process_is_refused(platform, machine, make_gpu, monkeypatch):
    machine.found = [make_gpu()]
    plan = platform.plan(workload())
    with pytest.raises(PlatformUnavailableError, match="the plan is for 'meta:3', this process finds meta:0"):
        platform.open(replace(plan, device_id="meta:3"), 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(PlatformUnavailableError, match="the plan is for 'meta:0', this process finds interpreter"):
        platform.open(plan, 0)


def test_nothing_opens_without_a_device(platform, machine, make_gpu):
    machine.found = [make_gpu()]
    plan = platform.plan(workload())
    machine.problem, machine.found = "no access", []
    with pytest.raises(PlatformUnavailableError, match="no access"):
        platform.open(plan, 0)


def test_memory_that_was_taken_since_the_plan_is_told(platform, machine, make_gpu):
    machine.found = [make_gpu()]
    plan = platform.plan(workload())
    machine.found = [replace(make_gpu(), available_bytes=GIB)]
    with pytest.raises(
        PlatformUnavailableError, match="it was taken since; end the processes that use it, or plan again"
    ):
        platform.open(plan, 0)


def test_what_probing_and_planning_take_imports_no_array_library():
    code = (
        "import sys, zif.accelerator.gpu.platform;"
        "print([name for name in ('torch', 'numpy', 'triton', 'psutil') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
