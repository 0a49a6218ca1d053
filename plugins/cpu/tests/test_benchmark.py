"""The benchmark of the native kernels, made small: every case is timed, and the table and the JSON are whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zif_cpu.library import Library, load_library

SCRIPT = Path(__file__).parents[3] / "benchmarks/cpu_kernels.py"


@pytest.mark.slow
def test_all_cases_run(tmp_path):
    if not isinstance(load_library(), Library):
        pytest.skip(str(load_library()))
    command = [sys.executable, str(SCRIPT), "--smoke", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "k")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "k").read_text())
    kinds = {row["name"].split()[0].rstrip(",") for row in result["rows"]}
    assert kinds == {"linear", "W8A8", "W8A16", "W4A16", "decode", "add", "rotate", "silu"}
    assert len(done.stdout.splitlines()) == len(result["rows"]) + 2
    assert all(row["ours_us"] > 0 and row["ratio"] > 0 for row in result["rows"])


def test_an_instruction_set_that_is_not_there_is_told():
    done = subprocess.run([sys.executable, str(SCRIPT), "--isa", "avx9"], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ZIF_CPU_ISA='avx9' must be" in done.stderr
