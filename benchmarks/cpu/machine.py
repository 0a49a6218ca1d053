"""What a result was measured on: processor, instruction sets, cores, memory, system, and which sources of zif."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = ("core/src", "plugins/cpu/src", "plugins/cpu/native", "plugins/cpu/CMakeLists.txt")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".inc", ".txt"}
ISA_WORDS = ("avx2", "fma", "f16c", "avx512", "avx_vnni", "amx")


def describe() -> dict[str, Any]:
    """Return the machine as the kernel describes it."""
    info = _cpuinfo()
    flags = sorted(flag for flag in info.get("flags", "").split() if flag.startswith(ISA_WORDS))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": info.get("model name", platform.processor()),
        "family": f"family {info.get('cpu family', '?')} model {info.get('model', '?')}",
        "instruction_sets": flags,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def title(described: Mapping[str, Any]) -> str:
    """Return cores, processor and the widest instruction sets of a described machine in words."""
    amx = " and AMX" if any(flag.startswith("amx") for flag in described["instruction_sets"]) else ""
    wide = "AVX-512" if any(flag.startswith("avx512") for flag in described["instruction_sets"]) else "AVX2"
    return f"{described['cores']} cores of {described['processor']} ({described['family']}, {wide}{amx})"


def source_digest() -> str:
    """Return a digest of zif's sources that a result of zif depends on: core, and the plugin with its kernels."""
    digest = hashlib.sha256()
    for name in SOURCES:
        root = ROOT / name
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """Return the commit of this checkout, marked when tracked files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
