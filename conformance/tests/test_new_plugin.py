"""`zif conform new-plugin` writes a plugin that passes before the first edit, and overwrites nothing."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from zif.cli.main import main
from zif_conformance import reference_platform
from zif_conformance.template.writing import PluginNames, plugin_files

_COMMAND = ["conform", "new-plugin"]


def _install(folder, site):
    """Put the package where Python finds it, with the metadata that its pyproject.toml asks for."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    for path in (folder / "src").iterdir():
        path.rename(site / path.name)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = "\n".join(f"{key} = {value}" for key, value in project["entry-points"]["zif.v1"].items())
    (info / "entry_points.txt").write_text(f"[zif.v1]\n{points}\n")


def _run(lab, *command):
    return subprocess.run(
        [sys.executable, *command], env=lab.environ, capture_output=True, text=True, cwd=lab.site.parent, check=False
    )


@pytest.fixture
def acme(lab, tmp_path):
    folder = tmp_path / "zif-acme"
    assert main([*_COMMAND, "acme", "--into", str(folder)]) == 0
    _install(folder, lab.site)
    return lab


def test_the_new_platform_is_found_and_plans(acme):
    done = _run(acme, "-m", "zif.cli", "platforms")
    assert done.returncode == 0, done.stderr
    assert "acme  (zif-acme 0.1.0)" in done.stdout
    assert "acme:0" in done.stdout


@pytest.mark.slow
def test_the_suite_passes_before_the_first_edit(acme, tmp_path):
    command = ["-m", "zif.cli", "conform", "--platform", "acme", "--level", "L0"]
    done = _run(acme, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_its_device_opens_and_computes(acme):
    code = """
import torch
from zif_conformance.subject import Subject
subject = Subject.find("acme")
with subject.opened() as device:
    lent = device.allocator.allocate(100, "test", alignment=256)
    assert not lent.array.any()
    result = device.ops.linear(torch.eye(4), 2 * torch.eye(4), None)
    assert torch.equal(result, 2 * torch.eye(4))
    assert device.health(5.0).healthy
    print(type(device).__module__)
"""
    done = _run(acme, "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "zif_acme.device"), done.stderr


def test_written_sources_name_no_other_plugin():
    for name, text in plugin_files(PluginNames("my_chip")).items():
        if not name.endswith(".py") or name.startswith("tests/"):
            continue
        ast.parse(text)
        assert "zif_conformance" not in text, name
        assert "ReferencePlatform" not in text, name
        assert "ZIF_REFERENCE" not in text, name


def test_the_new_plugin_has_every_part_of_the_reference_platform():
    files = plugin_files(PluginNames("my_chip"))
    parts = {path.rpartition("/")[2] for path in files if path.startswith("src/zif_my_chip/")}
    folder = Path(reference_platform.__path__[0])
    assert parts - {"py.typed"} == {path.name for path in folder.glob("*.py")}
    assert "class MyChipPlatform" in files["src/zif_my_chip/platform.py"]
    assert "zif-my-chip" in files["pyproject.toml"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Acme", "lower-case identifier"),
        ("zif-acme", "lower-case identifier"),
        ("1st", "lower-case identifier"),
        ("class", "lower-case identifier"),
        ("", "lower-case identifier"),
        ("../up", "lower-case identifier"),
        ("a" * 31, "at most 30"),
        ("reference", "taken by zif-conformance"),
        ("null", "taken by zif "),
        ("conformance", "'zif_conformance', which exists"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(name, reason, tmp_path, capsys):
    assert main([*_COMMAND, name, "--into", str(tmp_path / "new")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*_COMMAND, "acme", "--into", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "acme").write_text("mine")
    assert main([*_COMMAND, "acme", "--into", str(tmp_path / "acme")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "acme").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*_COMMAND, "acme", "--into", str(tmp_path / "file" / "under")]) == 2
    assert "name another folder" in capsys.readouterr().err
