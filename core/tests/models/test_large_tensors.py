"""Tensors that are read in many parts: right to the last value, and never held twice.

The same at 1.2 GB, with times: benchmarks/load_memory.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import build_tied_checkpoint, edit_config
from support.native_models import describe_native, load_native
from zif.errors import CheckpointError

NUM_TOKENS = 400_000
"""Of a vocabulary that makes the checkpoint 77 MB: large against the allocator's noise, small against a test's time."""

SLACK_BYTES = 24 << 20

MEASURE = """
import json, sys, types
from pathlib import Path
from support.host_memory import HostAllocator
from support.native_models import describe_native, load_native

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

description = describe_native(Path(sys.argv[1]), dtype=sys.argv[2])
before = status("VmRSS:")
model = load_native(description)
print(json.dumps({"growth": status("VmHWM:") - before, "weights": description.weight_bytes}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build_tied_checkpoint("llama3", tmp_path_factory.mktemp("large"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(NUM_TOKENS, 48)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, vocab_size=NUM_TOKENS)
    return path


def copy_with_last_value(folder: Path, target: Path, name: str, value: float) -> Path:
    """Copy the checkpoint with the last value changed of the embedding, or of the output matrix stored beside it."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors["model.embed_tokens.weight"].clone()
    tensors[name][-1, -1] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_value_arrives(dtype: str, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].to(getattr(torch, dtype))
    model = load_native(describe_native(folder, dtype=dtype))
    assert torch.equal(model.logits(torch.eye(48, dtype=stored.dtype)).T, stored.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_value_is_checked(dtype: str, folder: Path, tmp_path: Path) -> None:
    copy = copy_with_last_value(folder, tmp_path, "model.embed_tokens.weight", torch.inf)
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' in .* not finite"):
        load_native(describe_native(copy, dtype=dtype))


def test_repeated_output_matrix_is_compared_to_the_last_value(folder: Path, tmp_path: Path) -> None:
    copy = copy_with_last_value(folder, tmp_path, "lm_head.weight", 123.0)
    with pytest.raises(CheckpointError, match="is stored and differs"):
        load_native(describe_native(copy))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's count of resident memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_is_the_weights_and_little_more(dtype: str, folder: Path) -> None:
    support = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r})\n{MEASURE}", str(folder), dtype]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["growth"] > 0.9 * measured["weights"], "the measurement sees the weights"
    assert measured["growth"] < measured["weights"] + SLACK_BYTES
