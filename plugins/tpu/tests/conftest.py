"""For all tests: XLA drives the processor of this host; tests that need XLA are left out where it is not installed."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["PJRT_DEVICE"] = "CPU"
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = Path(__file__).resolve().parents[3] / "examples/embedded_model/checkpoint"


@pytest.fixture(scope="session")
def model() -> str:
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not installed: `make test-tpu` has it")
    return str(MODEL)
