"""What is installed, read from the files of packages, and the variables of Triton and OpenMP."""

import re
import sys
from types import SimpleNamespace

import pytest

from zif.accelerator.gpu.settings import is_interpreted, num_threads
from zif.accelerator.gpu.software import GpuSoftware, build_of_torch, package_folder
from zif.errors import ConfigError

LINE = re.compile(r"^toolkit\b[^=]*=\s*'(\d+\.\d+)", re.MULTILINE)


def test_steps_say_what_was_found():
    assert GpuSoftware("Toolkit", "2.9.0", (12, 8), None).steps() == (
        "torch: 2.9.0",
        "Toolkit that torch is built for: 12.8",
        "triton: not installed",
    )
    assert "Toolkit that torch is built for: none" in GpuSoftware("Toolkit", None, (), None).steps()


def test_the_build_of_torch_is_read_from_its_file_of_versions(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").write_text("raise AssertionError('imported')")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    assert build_of_torch(LINE) is None
    versions = tmp_path / "version.py"
    versions.write_text("other: Optional[str] = None\ntoolkit: Optional[str] = '6.4.43482-0f2d'\n")
    assert build_of_torch(LINE) == (6, 4)
    versions.write_text("toolkit: Optional[str] = None\n")
    assert build_of_torch(LINE) == ()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert build_of_torch(LINE) is None


def test_a_package_that_is_kept_out_has_no_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert package_folder("triton") is None
    assert package_folder("zif").name == "zif"


@pytest.mark.parametrize(("text", "expected"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)])
def test_the_interpreter_is_asked_for_as_triton_reads_it(text, expected):
    assert is_interpreted({"TRITON_INTERPRET": text}) is expected
    assert not is_interpreted({})


def test_threads_of_the_interpreter():
    assert num_threads({}) is None
    assert num_threads({"OMP_NUM_THREADS": "3"}) == 3
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        num_threads({"OMP_NUM_THREADS": "none"})
