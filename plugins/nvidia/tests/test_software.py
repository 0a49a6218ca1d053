"""What the installed torch is built for, read from its files."""

from types import SimpleNamespace

import pytest

from zif_nvidia.software import cuda_of_torch


@pytest.fixture
def torch_folder(tmp_path, monkeypatch):
    """A folder of torch that could be imported, empty."""
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '12.8'", (12, 8)),
        ("cuda = '13.0'", (13, 0)),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.1'", ()),
        ("hip = '6.4'", ()),
    ],
)
def test_the_file_of_versions_tells(torch_folder, line, cuda):
    (torch_folder / "version.py").write_text(f"__version__ = '2.9.0'\n{line}\n")
    assert cuda_of_torch("2.9.0+cu118") == cuda


@pytest.mark.parametrize(("version", "cuda"), [("2.9.0+cu128", (12, 8)), ("2.9.0+cpu", ()), ("2.9.0", ())])
def test_without_it_the_suffix_tells(torch_folder, version, cuda):
    assert cuda_of_torch(version) == cuda
