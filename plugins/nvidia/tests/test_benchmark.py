"""The benchmark of GPUs runs from end to end in the interpreter, on small inputs, and writes its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_benchmark_runs_without_a_gpu(tmp_path):
    table = tmp_path / "results" / "table.json"
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--json", str(table)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(table.read_text())
    assert written["smoke"]
    assert {"decode 2 x 64", "prefill 1 x 32", "add + norm", "rotary + KV write", "mixed lengths"} <= {
        row["name"] for row in written["rows"]
    }
    assert all(row["ours_s"] > 0 for row in written["rows"])
