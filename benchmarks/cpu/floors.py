"""What this machine can do at best: bytes read per second, and products per second in each type.

What it is: measured by every round of a comparison in a process of its own, so that engines are held against the same
minutes of the same machine. What it is not: a data sheet. Reading is a C loop over a gibibyte, compiled with the
machine's compiler; without one torch sums. Products are torch's, the best of several shapes with 2,048 rows.

    python -m cpu.floors FOLDER THREADS
"""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("read.c")
READ_BYTES = 2**30
ROWS = 2_048
SHAPES = ((1_024, 3_072), (1_024, 6_144), (3_072, 1_024), (2_048, 2_048))
"""Inner and outer sizes: those of the model's products, and one square."""


def read_bytes_per_s(folder: Path, threads: int) -> float:
    """Return how many bytes all threads read per second."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        data = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        return READ_BYTES * _best_rate(data.sum)
    library = folder / "floors" / f"read-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).read_bandwidth
    function.restype, function.argtypes = ctypes.c_double, (ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
    return float(function(READ_BYTES, threads, 8))


def products_per_s(kind: str) -> float:
    """Return multiplications and additions per second, 2 for each product, of the best shape in a type."""
    return max(_products(kind, inner, outer) for inner, outer in SHAPES)


def _products(kind: str, inner: int, outer: int) -> float:
    if kind == "int8":
        one = torch.randint(-127, 128, (ROWS, inner), dtype=torch.int8)
        other = torch.randint(-127, 128, (outer, inner), dtype=torch.int8).t()
        call: Callable[[], torch.Tensor] = lambda: torch._int_mm(one, other)  # noqa: E731
    else:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
        rows, weights = torch.randn(ROWS, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        call = lambda: torch.nn.functional.linear(rows, weights)  # noqa: E731
    return 2.0 * ROWS * inner * outer * _best_rate(call)


def _best_rate(call: Callable[[], object], repeats: int = 8) -> float:
    """Return calls per second of the fastest call after the first."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1 / min(times)


def main() -> None:
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    found = {"read_bytes_per_s": read_bytes_per_s(folder, threads)}
    found |= {f"{kind}_per_s": products_per_s(kind) for kind in ("bf16", "fp32", "int8")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
