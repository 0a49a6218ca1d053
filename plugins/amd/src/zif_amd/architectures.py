"""What each architecture can do, as data: the one place that tells them apart. Standard library only.

Waves, matrix instructions and LDS: LLVM's AMDGPUUsage (processor features) and AMD's instruction set guides. What is
multiplied and rounded by which instruction was read from what Triton 3.6 to 3.9 compile `tl.dot` to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Matrix(StrEnum):
    """The kind of matrix instructions. WMMA multiplies no float32."""

    MFMA = "MFMA"
    WMMA = "WMMA"


class Float8(StrEnum):
    """Which eight-bit floats the matrix instructions multiply: those without infinities or minus zero, or OCP's."""

    NONE = "none"
    FNUZ = "FNUZ"
    OCP = "OCP"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. `parts` are names on the market; `tuning` the folder whose tables serve it.

    `rounds_bfloat16` says that one instruction narrows float32 to bfloat16; elsewhere integer operations do.
    `min_rocm` is the first release whose builds of torch hold code for it, as a wheel's version names the release.
    """

    name: str
    parts: str
    wave_size: int
    matrix: Matrix
    tuning: str
    float8: Float8 = Float8.NONE
    lds_bytes: int = 64 << 10
    rounds_bfloat16: bool = False
    halves_bfloat16: bool = False
    min_rocm: tuple[int, int] = (6, 0)

    def costs(self, dtype: str) -> tuple[str, ...]:
        """Say what a dtype costs here that another would not; empty when it costs nothing."""
        costs = []
        if dtype == "float32" and self.matrix is Matrix.WMMA:
            costs.append(f"{self.name} multiplies float32 without matrix instructions: bfloat16 is many times faster")
        if dtype == "bfloat16" and self.halves_bfloat16:
            costs.append(f"{self.name} multiplies bfloat16 at half the speed of float16")
        if dtype == "bfloat16" and not self.rounds_bfloat16:
            costs.append(f"{self.name} rounds to bfloat16 in several integer operations")
        return tuple(costs)


_TABLE = (
    Architecture("gfx908", "Instinct MI100", 64, Matrix.MFMA, "gfx942", halves_bfloat16=True),
    Architecture("gfx90a", "Instinct MI210, MI250, MI250X", 64, Matrix.MFMA, "gfx942"),
    Architecture("gfx942", "Instinct MI300A, MI300X, MI325X", 64, Matrix.MFMA, "gfx942", Float8.FNUZ),
    Architecture(
        "gfx950",
        "Instinct MI350X, MI355X",
        64,
        Matrix.MFMA,
        "gfx950",
        Float8.OCP,
        lds_bytes=160 << 10,
        rounds_bfloat16=True,
        min_rocm=(6, 4),
    ),
    Architecture("gfx1100", "Radeon RX 7900, PRO W7900, W7800", 32, Matrix.WMMA, "gfx1100"),
    Architecture("gfx1101", "Radeon RX 7800, RX 7700, PRO W7700", 32, Matrix.WMMA, "gfx1100"),
    Architecture("gfx1102", "Radeon RX 7600", 32, Matrix.WMMA, "gfx1100"),
    Architecture("gfx1151", "Ryzen AI Max", 32, Matrix.WMMA, "gfx1100", min_rocm=(6, 4)),
    Architecture("gfx1200", "Radeon RX 9060", 32, Matrix.WMMA, "gfx1201", Float8.OCP, min_rocm=(6, 4)),
    Architecture("gfx1201", "Radeon RX 9070, AI PRO R9700", 32, Matrix.WMMA, "gfx1201", Float8.OCP, min_rocm=(6, 4)),
)

ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}

# Triton 3.9 compiles nothing for RDNA 1 and 2 ("unsupported target"), and for the others it multiplies lane by lane.
_WITHOUT_MATRIX_INSTRUCTIONS = ("gfx8", "gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c", "gfx101", "gfx103")


def why_unsupported(name: str) -> str:
    """Say why an architecture is not served, naming those that are; "" when it is."""
    if name in ARCHITECTURES:
        return ""
    why = "it is not among those that the kernels are compiled and tuned for"
    if name.startswith(_WITHOUT_MATRIX_INSTRUCTIONS):
        why = "it has no matrix instructions, neither MFMA nor WMMA"
    return f"{name} is not served, because {why}; served are {', '.join(ARCHITECTURES)}"


def target_name(version: int) -> str:
    """Return the compiler's name of a `gfx_target_version`: 90402 is gfx942, 90010 is gfx90a, 110501 is gfx1151.

    The major number is written in decimal, minor and step as one hexadecimal digit each (LLVM, AMDGPUUsage).
    """
    major, rest = divmod(version, 10_000)
    minor, step = divmod(rest, 100)
    return f"gfx{major}{minor:x}{step:x}"
