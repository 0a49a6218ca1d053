"""The code of this platform's kernels: `python -m zif_amd.inspection gfx942` compiles and counts, without a GPU.

Counts are read from the assembly and its metadata. Sizes of local data share: AMD Instinct and RDNA instruction set
guides, one work-group.
"""

import re
import sys
from collections.abc import Iterable

from zif.contract import CompiledKernel
from zif.kernels.compilation import CompiledSpecialization, Target
from zif.kernels.inspection import Counts, Part, inspect, print_kernels
from zif_amd.tables import read_tuning

ARCHITECTURES = ("gfx942", "gfx950", "gfx1100", "gfx1201")
"""What kernels are shipped for."""

_SHARED_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}
_MAX_SPILLS = {"gfx942": 0, "gfx950": 16, "gfx1100": 32, "gfx1201": 32}
_MORE_SPILLS = {
    "gfx1100": {"paged_attention": 112, "latent_decode": 416, "state_space_chunk": 96, "delta_chunk": 160},
    "gfx1201": {"latent_decode": 128},
}
"""Where a lane has 256 registers, operands of 512 elements do not fit into them."""
_WARP_SIZES = {"gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
_MATRIX = re.compile(r"\bv_(?:mfma|smfmac|wmma|swmmac)_\w+")
_SPILL = re.compile(r"[sv]gpr_spill_count:\s*(\d+)")
_WIDE = re.compile(r"\b(?:global_load|buffer_load)(?:_lds)?_(?:dwordx4|b128)\b")


def compiled_kernels() -> Iterable[CompiledKernel]:
    """Return what every architecture's code shows. Takes some minutes the first time."""
    return inspect("zif_amd.inspection", ARCHITECTURES)


def count(compiled: CompiledSpecialization) -> Counts:
    """Count in the assembly. Spills are registers of both kinds, as the compiler reports them."""
    text = compiled.assembly
    spills = sum(int(number) for number in _SPILL.findall(text))
    return Counts(len(_MATRIX.findall(text)), spills, len(_WIDE.findall(text)))


def main(architecture: str) -> None:
    """Print the kernels of one architecture."""
    target = Target("hip", architecture, _WARP_SIZES[architecture])
    limits = _SHARED_BYTES[architecture], _MAX_SPILLS[architecture], _MORE_SPILLS.get(architecture, {})
    part = Part(target, read_tuning(architecture), *limits)
    print_kernels(architecture, part, count)


if __name__ == "__main__":
    main(sys.argv[1])
