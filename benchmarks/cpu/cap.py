"""Have every engine compute as a lesser processor would, so that ratios are those of that processor.

What it is: a library preloaded into every process (`cap_avx512_vnni.c`) that answers CPUID without the instruction sets
above the cap, and has the kernel refuse AMX. Each library inside an engine then chooses by itself, as it would there:
the types it computes in too, not only its kernels. The documented switches of zif, oneDNN, MKL and torch say the same.
They alone are not enough. oneDNN's does not reach what engines ask the processor themselves: OpenVINO still computes in
bfloat16, then fails for want of kernels; vLLM still picks its own kernels for AMX.

What it is not: an emulation of that processor's caches, memory and clock.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpu.engines import Engine
from cpu.environments import PeerError

SWITCHES: Mapping[str, Mapping[str, str]] = {
    "avx512_vnni": {
        "ZIF_CPU_ISA": "avx512_vnni",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
        "ATEN_CPU_CAPABILITY": "avx512",
    }
}
"""What is set beside the library, by the name of the cap, which is that of zif's kernels. Sources: oneDNN's "CPU
Dispatcher Control", oneMKL's "Instruction Set Specific Dispatching on Intel Architectures" (E1: with VNNI)."""
WORDS: Mapping[str, str] = {"avx512_vnni": "AVX-512 and VNNI that has neither AMX nor AVX-512 for 16-bit floats"}
_COMPILED_AT_ONCE = "left out under a cap: it compiles kernels when it starts, and for which processor is not proved"
_COMPILED_BEFORE = "left out under a cap: its instruction sets are chosen when it is built, and it is built for all"
LEFT_OUT: Mapping[str, str] = {
    "vllm-bf16-compiled": _COMPILED_AT_ONCE,
    "llama-bf16": _COMPILED_BEFORE,
    "llama-q8_0": _COMPILED_BEFORE,
}
"""Engines that a cap does not provably reach, with the reason."""


@dataclass(frozen=True, slots=True)
class Cap:
    """A cap that works here: its name, the library in every process, and the variables that put it there."""

    isa: str
    library: Path
    variables: Mapping[str, str]


def prepare(folder: Path, isa: str) -> Cap:
    """Build the cap. Raises `PeerError` when there is no such cap or it does not work on this machine."""
    if isa not in SWITCHES:
        raise PeerError(f"there is no cap {isa!r}; there are {', '.join(SWITCHES)}")
    library = _built(folder, isa)
    preloaded = ":".join([str(library), *filter(None, [os.environ.get("LD_PRELOAD")])])
    found = Cap(isa, library, {**SWITCHES[isa], "LD_PRELOAD": preloaded})
    command = [sys.executable, "-c", f"assert {str(library)!r} in open('/proc/self/maps').read(), 'not preloaded'"]
    run = subprocess.run(command, env={**os.environ, **found.variables}, capture_output=True, text=True, check=False)
    if run.returncode:
        raise PeerError(f"nothing can be capped here: {run.stderr.strip()[-300:] or run.returncode}")
    return found


def _built(folder: Path, isa: str) -> Path:
    source = Path(__file__).with_name(f"cap_{isa}.c")
    library = (folder / "caps" / f"{isa}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.so").resolve()
    if library.exists():
        return library
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise PeerError("a cap needs a C compiler")
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise PeerError(f"the cap does not compile: {run.stderr.strip()[-600:]}")
    return library


def why_left_out(cap: Cap | None, engine: Engine) -> str | None:
    """Return why an engine does not run under the cap, or None when it does."""
    return LEFT_OUT.get(engine.name) if cap else None
