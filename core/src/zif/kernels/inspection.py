"""Showing the code of kernels without a device: each is compiled for an architecture and counted in by its vendor.

Compiling needs a process in which triton was not imported for the interpreter, so `inspect` starts one for each
architecture; it runs a module of the vendor, which calls `print_kernels`. What is compiled stays in Triton's cache.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from zif.contract import CompiledKernel
from zif.errors import ZifError
from zif.kernels.catalog import WALKS_OVER_KV, specializations
from zif.kernels.compilation import CompiledSpecialization, Target, compile_one
from zif.kernels.launch import Specialization
from zif.kernels.tuning import Tuning

_SHOWN_LINES = 12
_NARROW = frozenset({"*bf16", "*fp16", "*fp8e4nv", "*fp8e4b8", "*fp8e5", "*i8"})


@dataclass(frozen=True, slots=True)
class Part:
    """One architecture: what to compile for, its tuning, its shared memory, and how many spilled registers it bears.

    `max_spills` is for every kernel that `more_spills` does not name.

    Kernels over `missing_types` are left out: the compiler has no such type there, and the platform does not claim it.
    """

    target: Target
    tuning: Tuning
    max_shared_bytes: int
    max_spills: int
    more_spills: Mapping[str, int] = field(default_factory=dict)
    missing_types: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Counts:
    """What a vendor found in the code of one kernel."""

    matrix_instructions: int
    spills: int
    wide_loads: int


def inspect(module: str, architectures: Sequence[str], workers: int = 2) -> Iterable[CompiledKernel]:
    """Return the kernels of all architectures. `module` prints those of the one that it is called with.

    Raises `ZifError` with the end of what was printed when one cannot be compiled.
    """
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda name: _inspect_one(module, name), architectures):
            yield from found


def print_kernels(architecture: str, part: Part, count: Callable[[CompiledSpecialization], Counts]) -> None:
    """Compile every kernel for the architecture and print one JSON object a line."""
    for specialization in specializations(part.tuning):
        if part.missing_types & {kind for _, kind in specialization.signature}:
            continue
        compiled = compile_one(specialization, part.target)
        counts = count(compiled)
        kernel = CompiledKernel(
            name=_describe(specialization),
            architecture=architecture,
            num_matrix_instructions=counts.matrix_instructions,
            needs_matrix_instructions=compiled.multiplies and _narrow(specialization),
            num_spills=counts.spills,
            max_spills=part.more_spills.get(specialization.name, part.max_spills),
            num_wide_loads=counts.wide_loads,
            needs_wide_loads=specialization.name in WALKS_OVER_KV,
            shared_bytes=compiled.shared_bytes,
            max_shared_bytes=part.max_shared_bytes,
        )
        print(json.dumps(asdict(kernel)), flush=True)


def _inspect_one(module: str, architecture: str) -> list[CompiledKernel]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-_SHOWN_LINES:])
        raise ZifError(f"kernels cannot be compiled for {architecture!r}: {' '.join(command)} ended with:\n{last}")
    return [CompiledKernel(**json.loads(line)) for line in done.stdout.splitlines()]


def _narrow(specialization: Specialization) -> bool:
    """Say whether matrix units take the operands: float32 in full precision goes without them on most parts."""
    return any(kind in _NARROW for _, kind in specialization.signature)


def _describe(specialization: Specialization) -> str:
    types = "-".join(dict.fromkeys(kind[1:] for _, kind in specialization.signature if kind.startswith("*")))
    constants = ",".join(f"{name}={value}" for name, value in specialization.constants if value is not None)
    config = specialization.config
    return f"{specialization.name}[{types},{constants},warps={config.num_warps},stages={config.num_stages}]"
