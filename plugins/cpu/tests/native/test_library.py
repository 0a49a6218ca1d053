"""Finding, loading and choosing the native library, and what is said where that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zif.contract import FullAttentionSpec, Plan, Workload
from zif.errors import ConfigError
from zif_cpu import library as native
from zif_cpu.library import Kernels, Library, choose_kernels, load_library
from zif_cpu.platform import CpuPlatform

WORKLOAD = Workload("float32", (FullAttentionSpec((0,), 2, 16, 16, "float32"),), (16,), frozenset(), 1, 1, 64, 1, 16)


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """A machine where the package was installed without a compiler."""
    monkeypatch.setattr(native, "_places", lambda: [tmp_path / "nothing"])
    monkeypatch.delenv("ZIF_CPU_LIBRARY", raising=False)
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def present():
    if not isinstance(load_library(), Library):
        pytest.skip(str(load_library()))
    return load_library()


def test_the_best_instruction_set_serves_unless_another_is_asked_for(present):
    assert choose_kernels(None) == Kernels(present, present.isas[-1])
    assert choose_kernels("portable") == Kernels(present, "portable")
    assert choose_kernels("torch").library is None


def test_an_unknown_instruction_set_is_told_with_those_that_serve(present):
    with pytest.raises(ConfigError, match=r"ZIF_CPU_ISA='avx9' must be one of portable.*torch"):
        choose_kernels("avx9")


def test_a_wrong_setting_makes_the_platform_unavailable_and_says_why(monkeypatch):
    monkeypatch.setenv("ZIF_CPU_ISA", "avx9")
    probe = CpuPlatform().probe()
    assert not probe.devices
    assert "ZIF_CPU_ISA='avx9'" in probe.reason


@pytest.mark.parametrize("isa", ["portable", "torch"])
def test_the_plan_says_what_computes(present, monkeypatch, isa):
    monkeypatch.setenv("ZIF_CPU_ISA", isa)
    plan = CpuPlatform().plan(WORKLOAD)
    assert isinstance(plan, Plan)
    native_parts = [what for _, what in plan.implementations if what.startswith("zif_cpu.")]
    served = (
        "attention.NativeAttention",
        "programs.StepPrograms",
        "operators.NativeOps",
        "quantized.QuantizedOps",
    )
    assert native_parts == ([] if isa == "torch" else [f"zif_cpu.{part}" for part in served])
    said = "torch computes in place of native kernels: ZIF_CPU_ISA asks for it" if isa == "torch" else "portable"
    assert any(said in note for note in plan.notes)


@pytest.mark.usefixtures("absent")
def test_without_the_library_torch_computes_and_the_plan_says_why():
    plan = CpuPlatform().plan(WORKLOAD)
    assert isinstance(plan, Plan)
    assert not any(what.startswith("zif_cpu.") for _, what in plan.implementations)
    assert any("installed without its native kernels; install a C++20 compiler" in note for note in plan.notes)
    CpuPlatform().open(plan, 0).close()


@pytest.mark.usefixtures("absent")
def test_asking_for_an_instruction_set_without_the_library_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"'avx2' must be torch.*installed without its native kernels"):
        choose_kernels("avx2")


def test_a_library_of_another_version_is_refused(present, monkeypatch):
    monkeypatch.setattr(native, "ABI", 999)
    load_library.cache_clear()
    try:
        said = load_library()
    finally:
        load_library.cache_clear()
    assert isinstance(said, str)
    assert "of the interface, zif-cpu calls 999; install zif-cpu again" in said


def test_a_file_that_is_no_library_is_told(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(native, "_places", lambda: [tmp_path / "broken.so"])
    load_library.cache_clear()
    said = load_library()
    load_library.cache_clear()
    assert isinstance(said, str)
    assert said.startswith("the native kernels do not load")


def test_a_named_file_that_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("ZIF_CPU_LIBRARY", str(tmp_path / "missing.so"))
    load_library.cache_clear()
    said = load_library()
    load_library.cache_clear()
    assert said == f"ZIF_CPU_LIBRARY={str(tmp_path / 'missing.so')!r} is no file; unset it, or build that library"


def test_a_library_of_something_else_is_told(monkeypatch):
    monkeypatch.setenv("ZIF_CPU_LIBRARY", _path_of_libc())
    load_library.cache_clear()
    said = load_library()
    load_library.cache_clear()
    assert isinstance(said, str)
    assert "is not the library of zif-cpu" in said


def _path_of_libc():
    """Return a library that is surely loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if "libc.so" in line or "libc-" in line)


def test_loading_imports_no_array_library():
    source = Path(native.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); from zif_cpu.library import load_library; load_library();"
        "print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


FAULTS = """
import resource, sys
import torch
from zif_cpu.library import choose_kernels

kernels = choose_kernels(None)
kernels.library.use(kernels.isa, 1)

def faults_of(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(9 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of(16)
print(faults_of(8))
"""


@pytest.mark.parametrize(("tuned", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False)])
def test_memory_of_a_step_is_not_faulted_in_again_unless_the_allocator_is_tuned(present, tuned, kept):
    environ = {**os.environ, "ZIF_CPU_ISA": "portable", **tuned}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=environ, capture_output=True, text=True, check=True)
    pages = 8 * (9 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert (int(ran.stdout) < pages // 100) == kept, f"{ran.stdout} faults of {pages} pages"
