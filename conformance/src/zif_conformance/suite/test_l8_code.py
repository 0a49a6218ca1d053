"""L8: the code of compiled kernels, judged without the device: matrix instructions, spills, wide loads, shared memory.

The platform compiles every kernel and configuration that it ships and counts in the binaries; the suite holds it to
its own statements and to what no kernel may do.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from zif.contract import CompiledKernel
from zif_conformance.marks import conforms
from zif_conformance.subject import Subject

_SHOWN = 5


@pytest.fixture(scope="module")
def compiled(subject: Subject) -> Sequence[CompiledKernel]:
    """Everything that the platform ships."""
    return tuple(subject.platform.compiled_kernels())


def _refuse(compiled: Sequence[CompiledKernel], is_bad: Callable[[CompiledKernel], bool], what: str) -> None:
    bad = [kernel for kernel in compiled if is_bad(kernel)]
    assert not bad, f"{len(bad)} of {len(compiled)} {what}: {bad[:_SHOWN]}"


@conforms(level="L8", clause="13.1", claims=("static_code",), deadline_s=1800)
def test_every_architecture_has_the_same_kernels(compiled: Sequence[CompiledKernel]) -> None:
    assert compiled, "the device claims static_code, and the platform shows no kernel"
    counts = Counter(kernel.architecture for kernel in compiled)
    named = {name: {k.name.split("[")[0] for k in compiled if k.architecture == name} for name in counts}
    every = set().union(*named.values())
    assert all(names == every for names in named.values()), f"kernels differ: {named}"


@conforms(level="L8", clause="13.2", claims=("static_code",), deadline_s=1800)
def test_products_use_matrix_instructions(compiled: Sequence[CompiledKernel]) -> None:
    assert any(kernel.needs_matrix_instructions for kernel in compiled), "no kernel multiplies matrices"
    _refuse(
        compiled,
        lambda kernel: kernel.needs_matrix_instructions and not kernel.num_matrix_instructions,
        "kernels multiply matrices without matrix instructions",
    )


@conforms(level="L8", clause="13.3", claims=("static_code",), deadline_s=1800, negative=True)
def test_nothing_is_spilled_beyond_what_is_stated(compiled: Sequence[CompiledKernel]) -> None:
    _refuse(compiled, lambda kernel: kernel.num_spills > kernel.max_spills, "kernels spill registers")


@conforms(level="L8", clause="13.4", claims=("static_code",), deadline_s=1800)
def test_keys_and_values_are_loaded_in_wide_pieces(compiled: Sequence[CompiledKernel]) -> None:
    assert any(kernel.needs_wide_loads for kernel in compiled), "no kernel walks over keys and values"
    _refuse(
        compiled,
        lambda kernel: kernel.needs_wide_loads and not kernel.num_wide_loads,
        "kernels that walk over keys and values load less than 16 bytes at once",
    )


@conforms(level="L8", clause="13.5", claims=("static_code",), deadline_s=1800, negative=True)
def test_programs_fit_into_shared_memory(compiled: Sequence[CompiledKernel]) -> None:
    _refuse(compiled, lambda k: not 0 <= k.shared_bytes <= k.max_shared_bytes, "kernels take too much shared memory")
