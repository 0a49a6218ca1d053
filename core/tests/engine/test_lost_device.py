"""A device that is lost in a step: the engine ends with its name, and closing it hides nothing."""

from pathlib import Path

import pytest

from zif import LLM, SamplingParams
from zif.accelerator.faults import device_faults
from zif.errors import EngineError
from zif.runtime.runner import TorchRunner

MODEL = str(Path(__file__).resolve().parents[3] / "examples/embedded_model/checkpoint")
SMALL = {"max_num_seqs": 4, "max_model_len": 64, "kv_bytes": 1 << 24}


def test_a_lost_device_ends_the_engine_and_is_closed(monkeypatch):
    llm = LLM(MODEL, platform="cpu", **SMALL)
    device = llm._engine._parts.device
    monkeypatch.setattr(type(device), "watch", lambda device: device_faults(device.array_device))
    llm.generate(["a"], SamplingParams(max_tokens=2), use_tqdm=False)

    def fail(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(TorchRunner, "_forward", fail)
    monkeypatch.setattr(TorchRunner, "close", fail)
    with pytest.raises(EngineError, match=r"DeviceLostError.*is lost: a kernel read or wrote outside its memory"):
        llm.generate(["a"], SamplingParams(max_tokens=2), use_tqdm=False)
    llm.close()
    assert device.health(5.0).detail == "the device is closed"
