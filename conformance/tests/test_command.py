"""`zif conform` from outside: bad names, interrupted and killed runs, the pytest plugin, the frozen lists."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zif.cli.main import main
from zif_conformance.bundle.verify import read_result, verify_bundle
from zif_conformance.freeze import FOLDER, frozen_texts
from zif_conformance.marks import LEVELS
from zif_conformance.profiles import PROFILE_NAMES, parse_levels, profile
from zif_conformance.supervisor import RunOptions, collect

_DRIVER = """
import sys
from pathlib import Path
from zif_conformance.conduct import Conductor
from zif_conformance.supervisor import RunOptions
Conductor(RunOptions("toy", ("L1",), suite=Path(sys.argv[1])), None, Path(sys.argv[2])).run()
"""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--platform", "nul"], "did you mean 'null'"),
        (["--platform", "null", "--profile", "cor"], "did you mean 'core'"),
        (["--platform", "null", "--profile", "quantized-int4"], "profiles: core"),
        (["--platform", "null", "--level", "L10"], "did you mean"),
        (["--platform", "null", "--level", "L0-L33"], "levels: L0 to L9"),
        (["--platform", "null", "--level", ""], "unknown level"),
        (["--platform", "null", "--level", "L0", "--profile", "core"], "does not go with"),
        ([], "--platform is missing"),
        (["list", "serv1ng"], "did you mean 'serving'"),
        (["verify", "no/such/folder"], "cannot be read"),
        (["compare", "no/such/folder", "nor/this"], "cannot be read"),
        (["--platform", "null", "--bundle", "/proc/bundle"], "choose another folder"),
    ],
)
def test_bad_words_are_refused_with_what_was_meant(capsys, arguments, hint):
    assert main(["conform", *arguments]) == 2
    assert hint in capsys.readouterr().err


def test_levels_are_read():
    assert parse_levels("l0-L2, L7") == ("L0", "L1", "L2", "L7")
    assert parse_levels("L3,L3") == ("L3",)


def _start(lab, folder):
    lab.plugin()
    lab.tests(
        """
        @conforms(level="L1", clause="5.1")
        def test_quick(subject):
            assert subject

        @conforms(level="L1", clause="5.1")
        def test_slow(subject, tmp_path_factory):
            Path(os.environ["ZIF_TOY_STARTED"]).touch()
            threading.Event().wait()
        """.replace("Path(", "__import__('pathlib').Path(")
    )
    started = folder.parent / "started"
    environ = {**lab.environ, "ZIF_TOY_STARTED": str(started)}
    command = [sys.executable, "-c", _DRIVER, str(lab.suite), str(folder)]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        os.sched_yield()
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_run_leaves_a_partial_bundle(lab, tmp_path, how):
    folder = tmp_path / "bundle"
    process = _start(lab, folder)
    process.send_signal(how)
    process.communicate(timeout=30)
    result = read_result(folder)
    assert (result["status"], result["score"], result["verdict"]) == ("partial", None, None)
    assert "partial" in verify_bundle(folder)[0]
    if how != signal.SIGKILL:
        assert [test["outcome"] for test in result["tests"]] == ["passed", "not run"]


def test_children_end_with_a_killed_run(lab, tmp_path):
    process = _start(lab, tmp_path / "bundle")
    children = _children(process.pid)
    assert children
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 30
    while any(map(_alive, children)):
        assert time.monotonic() < deadline, f"{children} live on"
        os.sched_yield()


def _children(pid):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _parent(name) == pid:
            found.append(int(name))
    return found


def _parent(name):
    try:
        with open(f"/proc/{name}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return -1


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_plain_pytest_runs_the_suite_and_gives_no_verdict(lab, tmp_path):
    lab.plugin()
    lab.tests('\n@conforms(level="L1", clause="5.1")\ndef test_a(subject):\n    assert subject\n')
    folder = tmp_path / "bundle"
    command = [sys.executable, "-m", "pytest", "-q", "--zif-platform", "toy", "--zif-bundle", folder, lab.suite]
    done = subprocess.run(
        list(map(str, command)), env=lab.environ, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["counts"]["passed"], result["status"]) == (1, "partial")


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--zif-platform", "toy", "--zif-profile", "cor"], "did you mean 'core'"), ([], "no platform under test")],
)
def test_plain_pytest_says_what_is_wrong(lab, tmp_path, options, reason):
    lab.plugin()
    lab.tests('\n@conforms(level="L1", clause="5.1")\ndef test_a(subject):\n    assert subject\n')
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *options, str(lab.suite)]
    done = subprocess.run(command, env=lab.environ, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert reason in done.stdout + done.stderr


@pytest.fixture(scope="session")
def cases():
    return collect(RunOptions("null", LEVELS))


@pytest.mark.slow
def test_the_lists_are_what_the_suite_holds(cases):
    for name, text in frozen_texts(cases).items():
        assert (FOLDER / name).read_text() == text, f"{name} differs: run `make freeze`, read the difference, commit it"


def test_larger_profiles_hold_the_smaller_ones():
    core, serving, distributed, *_ = (set(profile(name).must_pass) for name in PROFILE_NAMES)
    assert core <= serving <= distributed


@pytest.mark.slow
def test_at_least_half_of_all_tests_are_negative(cases):
    assert 2 * sum(case.declaration.negative for case in cases) >= len(cases)


@pytest.mark.slow
def test_every_clause_of_a_test_exists(cases):
    contract = (Path(__file__).parents[2] / "docs" / "contract.md").read_text()
    clauses = {clause for case in cases for clause in case.declaration.clauses}
    assert [clause for clause in sorted(clauses) if f"**{clause}**" not in contract] == []
