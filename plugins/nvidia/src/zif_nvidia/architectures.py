"""The architectures that this platform serves: what their parts can do, and what software they need. A table, no code.

Shared memory is that of one thread block, and dtypes are those of the matrix instructions (CUDA C++ programming guide,
technical specifications per compute capability). Matrix instructions are those that Triton 3.6 to 3.9 was seen to emit
for zif's kernels; before sm_80 it multiplies and adds one by one.
"""

from dataclasses import dataclass

_KIB = 1 << 10

NO_MATRIX = "no"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One compute capability.

    `matrix` names its matrix instructions. `min_cuda` is the oldest CUDA for which torch must be built, `last_cuda` the
    last major version that serves it, None for all; `min_triton` is the oldest Triton that compiles for it.
    """

    name: str
    parts: str
    shared_bytes: int
    matrix: str
    bfloat16: bool = True
    float8: bool = False
    min_cuda: tuple[int, int] = (11, 8)
    last_cuda: int | None = None
    min_triton: tuple[int, int] = (3, 6)


ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("sm_70", "V100", 96 * _KIB, NO_MATRIX, bfloat16=False, last_cuda=12),
        Architecture("sm_72", "Xavier", 96 * _KIB, NO_MATRIX, bfloat16=False, last_cuda=12),
        Architecture("sm_75", "T4, RTX 20", 64 * _KIB, NO_MATRIX, bfloat16=False),
        Architecture("sm_80", "A100, A30", 163 * _KIB, "mma"),
        Architecture("sm_86", "A10, A40, RTX 30", 99 * _KIB, "mma"),
        Architecture("sm_87", "Orin", 163 * _KIB, "mma"),
        Architecture("sm_89", "L4, L40, RTX 40", 99 * _KIB, "mma", float8=True),
        Architecture("sm_90", "H100, H200", 227 * _KIB, "wgmma", float8=True),
        Architecture("sm_100", "B200", 227 * _KIB, "tcgen05", float8=True, min_cuda=(12, 8)),
        Architecture("sm_103", "B300", 227 * _KIB, "tcgen05", float8=True, min_cuda=(12, 8)),
        Architecture("sm_110", "Thor", 227 * _KIB, "tcgen05", float8=True, min_cuda=(13, 0), min_triton=(3, 7)),
        Architecture("sm_120", "RTX 50, RTX PRO", 99 * _KIB, "mma", float8=True, min_cuda=(12, 8)),
        Architecture("sm_121", "GB10", 99 * _KIB, "mma", float8=True, min_cuda=(12, 8)),
    )
}
"""By name."""

OLDEST = "sm_70"


def number(name: str) -> int:
    """Return 90 of "sm_90"."""
    return int(name.removeprefix("sm_"))


def why_unsupported(name: str) -> str:
    """Say why an architecture is not served, with the next step; "" when it is."""
    if name in ARCHITECTURES:
        return ""
    if number(name) < number(OLDEST):
        first = ARCHITECTURES[OLDEST].parts
        return f"{name} is too old: Triton compiles for {OLDEST} and later; use a GPU from {first} on"
    return f"{name} is not known to this version of zif-nvidia; install a newer one"


def no_bfloat16(name: str) -> str:
    """Say why an architecture does not serve bfloat16, with the next step; "" when it does."""
    if name not in ARCHITECTURES or ARCHITECTURES[name].bfloat16:
        return ""
    parts = ARCHITECTURES[name].parts
    return f"{name} ({parts}) has no bfloat16 arithmetic; set dtype to float16, or to float32 where float16 overflows"
