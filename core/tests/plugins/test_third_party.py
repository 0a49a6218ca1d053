"""Plugins of third parties: installed as packages of their own, found by their entry points, guarded when broken.

`acme/` doubles as the example for vendors.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_MODEL = _HERE.parents[2] / "examples" / "embedded_model" / "checkpoint"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install both packages, as pip would for a user, into a folder of their own."""
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for package in ("acme", "broken"):
        shutil.copytree(_HERE / package, sources / package)
    _pip(target, sources / "acme", sources / "broken")
    return target


def _pip(target, *folders):
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", target, *folders]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


def _zif(arguments, *sites):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sites)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zif.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def _generate(platform, output, *sites):
    options = ["--prompts-file", _HERE / "prompts.txt", "--output", output, "--max-tokens", 12, "--temperature", 0]
    options += ["--platform", platform, "--dtype", "float32", "--kv-bytes", "8MiB"]
    done = _zif(["generate", _MODEL, *options], *sites)
    assert done.returncode == 0, done.stderr
    lines = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["outputs"][0]["token_ids"] for line in lines]


def test_a_plugin_is_found_and_a_broken_one_does_not_stop_the_others(installed):
    done = _zif(["platforms", "--json"], installed)
    assert done.returncode == 0, done.stderr
    entries = {entry["platform"]: entry for entry in json.loads(done.stdout)}
    assert entries["acme"]["distribution"] == "zif-acme 1.2.3"
    assert entries["acme"]["devices"][0]["name"] == "Acme One"
    assert entries["broken"]["distribution"] == "zif-broken 0.0.1"
    assert "libbroken.so.1" in entries["broken"]["failure"]
    assert "null" in entries


def test_asking_for_the_broken_platform_shows_its_reason(installed):
    done = _zif(["explain", _MODEL, "--platform", "broken"], installed)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "libbroken.so.1" in done.stderr


def test_a_platform_that_is_not_installed_is_an_error_with_the_names_of_those_that_are(installed):
    done = _zif(["explain", _MODEL, "--platform", "acmee"], installed)
    assert done.returncode == 1
    assert "acme" in done.stderr
    assert "null" in done.stderr


def test_the_plan_names_what_serves_each_op(installed):
    done = _zif(["explain", _MODEL, "--platform", "acme", "--json"], installed)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["platform"] == "acme"
    assert plan["implementations"]["allocator"] == "zif_acme.device.AcmeAllocator"


def test_the_same_tokens_as_on_the_cpu(installed, tmp_path):
    pytest.importorskip("zif_cpu")
    on_acme = _generate("acme", tmp_path / "acme.jsonl", installed)
    assert all(len(token_ids) > 0 for token_ids in on_acme)
    assert on_acme == _generate("cpu", tmp_path / "cpu.jsonl", installed)


def test_two_plugins_that_claim_one_name_are_refused_by_both_names(installed, tmp_path):
    fork = tmp_path / "fork"
    shutil.copytree(_HERE / "acme", fork)
    (fork / "zif_acme").rename(fork / "zif_acme_fork")
    for path in (fork / "pyproject.toml", *fork.rglob("*.py")):
        path.write_text(path.read_text().replace("zif_acme", "zif_acme_fork").replace('"zif-acme"', '"zif-acme-fork"'))
    _pip(tmp_path / "site", fork)
    done = _zif(["explain", _MODEL, "--platform", "acme"], installed, tmp_path / "site")
    assert done.returncode == 1
    assert "zif-acme 1.2.3" in done.stderr
    assert "zif-acme-fork 1.2.3" in done.stderr
