"""Compiling recorded kernels for an architecture that need not be there, to look at the code that it would run."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from zif.kernels.launch import Recorder, Specialization
from zif.kernels.tuning import Tuning


@dataclass(frozen=True, slots=True)
class Target:
    """What to compile for: the compiler's name of the vendor, its name or number of the part, threads of a warp."""

    backend: str
    architecture: int | str
    warp_size: int


@dataclass(frozen=True, slots=True)
class CompiledSpecialization:
    """The result. `assembly` is the text of the last stage that has one, `binary` what the driver would load.

    `multiplies` says whether the kernel, as it was written for these constants, multiplies matrices.
    """

    specialization: Specialization
    multiplies: bool
    assembly: str
    binary: bytes
    shared_bytes: int


def record(family: Callable[[Recorder], None], tuning: Tuning) -> list[Specialization]:
    """Return what `family` would have compiled: it calls the family's functions with arrays on the device "meta"."""
    recorder = Recorder(tuning)
    family(recorder)
    return recorder.recorded


def compile_all(found: Iterable[Specialization], target: Target) -> Iterator[CompiledSpecialization]:
    """Compile without a device. Triton must not have been imported for the interpreter."""
    for specialization in found:
        yield compile_one(specialization, target)


def compile_one(specialization: Specialization, target: Target) -> CompiledSpecialization:
    """Compile one specialization."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialization.kernel
    index = {name: place for place, name in enumerate(kernel.arg_names)}
    constants = dict(specialization.constants)
    types = dict(specialization.signature)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in sorted(specialization.aligned)},
    )
    compiled: Any = triton.compile(
        source,
        target=GPUTarget(target.backend, target.architecture, target.warp_size),
        options=specialization.config.compiler_options(),
    )
    text = next(compiled.asm[stage] for stage in ("ptx", "amdgcn") if stage in compiled.asm)
    binary = next(compiled.asm[stage] for stage in ("cubin", "hsaco") if stage in compiled.asm)
    multiplies = "tt.dot" in compiled.asm["ttir"]
    return CompiledSpecialization(specialization, multiplies, text, binary, compiled.metadata.shared)
