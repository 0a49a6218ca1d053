"""Generation end to end: the embedded model's text is the CPU plugin's, with IPEX and without."""

import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from zif import LLM, SamplingParams
from zif.contract import ENTRY_POINT_GROUP
from zif.plugins import PlatformRegistry

MODEL = str(Path(__file__).resolve().parents[3] / "examples/embedded_model/checkpoint")
PROMPTS = ["Return a list of", "Raise an error", "The first", "A" * 90]
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "kv_bytes": 1 << 24}


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """Both plugins, installed or not: in the main environment there is a newer torch, and no IPEX."""
    points = [EntryPoint(name, f"zif_{name}.plugin", ENTRY_POINT_GROUP) for name in ("cpu", "intel")]
    registry = PlatformRegistry.load(points)
    monkeypatch.setattr(PlatformRegistry, "discover", classmethod(lambda _: registry))


def _texts(platform, dtype):
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    with LLM(MODEL, platform=platform, dtype=dtype, **SMALL) as llm:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, sampling, use_tqdm=False)]


@pytest.mark.parametrize("ipex", ["on", "off"])
def test_greedy_text_is_the_cpu_plugins(monkeypatch, ipex):
    monkeypatch.setenv("ZIF_INTEL_IPEX", ipex)
    assert _texts("intel", "float32") == _texts("cpu", "float32")


def test_the_platform_is_preferred_to_the_plain_one():
    assert PlatformRegistry.discover().select(None).name == "intel"


def test_binding_to_a_node_lasts_as_long_as_the_engine(monkeypatch):
    before = os.sched_getaffinity(0)
    monkeypatch.setenv("ZIF_INTEL_NUMA_NODE", "0")
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("this system does not say which NUMA nodes it has")
    with LLM(MODEL, platform="intel", **SMALL) as llm:
        assert os.sched_getaffinity(0) <= before
        llm.generate(["x"], SamplingParams(max_tokens=2), use_tqdm=False)
    assert os.sched_getaffinity(0) == before
