"""The code of this platform's kernels: `python -m zif_nvidia.inspection sm_90` compiles and counts, without a GPU.

Counts are read from the machine code in the binary (SASS), with the disassembler that comes with Triton. The limits of
shared memory are those of one thread block in the CUDA C++ programming guide, technical specifications per compute
capability.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from zif.contract import CompiledKernel
from zif.kernels.compilation import CompiledSpecialization, Target
from zif.kernels.inspection import Counts, Part, inspect, print_kernels
from zif_nvidia.tables import read_tuning

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""What tables are shipped for. Other parts run the portable tables, which show here where these have no rule."""

_SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
_MAX_SPILLS = {"sm_80": 32, "sm_90": 0, "sm_100": 16}
_MISSING_TYPES = {"sm_80": frozenset({"*fp8e4nv"})}
_MATRIX = re.compile(r"\b(?:HMMA|HGMMA|QMMA|QGMMA|IMMA|IGMMA|OMMA|UTC\w*MMA)\b")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")
_WIDE = re.compile(r"\b(?:LDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128|UTMALDG)\b")


def compiled_kernels() -> Iterable[CompiledKernel]:
    """Return what every architecture's code shows. Takes some minutes the first time."""
    return inspect("zif_nvidia.inspection", ARCHITECTURES)


def count(compiled: CompiledSpecialization) -> Counts:
    """Count in the machine code. A spill is an instruction that moves a register to or from the stack."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return Counts(*(len(pattern.findall(text)) for pattern in (_MATRIX, _SPILL, _WIDE)))


def main(architecture: str) -> None:
    """Print the kernels of one architecture."""
    target = Target("cuda", int(architecture.removeprefix("sm_")), 32)
    limits = _SHARED_BYTES[architecture], _MAX_SPILLS[architecture]
    part = Part(target, read_tuning(architecture), *limits, missing_types=_MISSING_TYPES.get(architecture, frozenset()))
    print_kernels(architecture, part, count)


if __name__ == "__main__":
    main(sys.argv[1])
