"""Tables: which rule serves, what a broken table says, and how tables are written from measurements."""

import json

import pytest
import torch

from zif.errors import ConfigError
from zif.kernels import norms
from zif.kernels.interpreter import InterpretedLauncher
from zif.kernels.launch import Recorder
from zif.kernels.regenerate import Shape, Study, regenerate, studies
from zif.kernels.tuning import DEFAULT_FOLDER, INTERPRETER_FOLDER, LaunchConfig, Tuning


def write(folder, table):
    (folder / "norms.json").write_text(json.dumps(table))
    return folder


def test_the_first_rule_that_holds_serves_and_the_default_the_rest(tmp_path):
    rules = [
        {"when": {"columns": [1, 100]}, "tiles": {"ROWS": 3}, "num_warps": 2, "options": {"waves_per_eu": 2}},
        {"when": {"columns": [50, 200]}, "tiles": {"ROWS": 5}},
    ]
    tuning = Tuning.read(write(tmp_path, {"rms_norm": rules}))
    assert tuning.config("rms_norm", columns=100)["ROWS"] == 3
    assert tuning.config("rms_norm", columns=100).compiler_options()["waves_per_eu"] == 2
    assert tuning.config("rms_norm", columns=101)["ROWS"] == 5
    assert tuning.config("rms_norm", columns=201) == Tuning.read().config("rms_norm", columns=201)


def test_a_kernel_without_rules_is_an_error_with_the_next_step():
    with pytest.raises(ConfigError, match=r"no tuning rule of kernel 'nothing' holds for \{'rows': 2\}; add one"):
        Tuning.read().config("nothing", rows=2)


@pytest.mark.parametrize("text", ["{", '{"a": [{"tile": {}}]}', '{"a": [3]}', "[1]", '{"a": [{"when": {"x": 1}}]}'])
def test_a_broken_table_is_named(tmp_path, text):
    (tmp_path / "norms.json").write_text(text)
    with pytest.raises(ConfigError, match=r"norms\.json cannot be read: .*; write it anew"):
        Tuning.read(tmp_path)


def test_the_interpreter_has_rules_for_every_kernel():
    default = Tuning.read().kernels()
    own = {name for path in INTERPRETER_FOLDER.glob("*.json") for name in json.loads(path.read_text())}
    assert own <= default
    assert {path.name for path in DEFAULT_FOLDER.glob("*.json")} >= {path.name for path in INTERPRETER_FOLDER.glob("*")}


def test_the_fastest_candidate_becomes_a_rule(tmp_path, capsys):
    x, weight = torch.randn(8, 64), torch.ones(64)
    candidates = [LaunchConfig((("ROWS", rows),), num_warps=rows) for rows in (1, 2, 4)]
    study = Study("norms", "rms_norm", [Shape({"columns": (1, 64)}, _norm(x, weight))], candidates)
    times = iter((3.0, RuntimeError("out of resource: shared memory"), 2.0))

    def seconds(work):
        work()
        time = next(times)
        if isinstance(time, Exception):
            raise time
        return time

    (path,) = regenerate([study], tmp_path / "made", InterpretedLauncher, seconds)
    assert "{'ROWS': 2}: passed over, out of resource" in capsys.readouterr().out
    tuning = Tuning.read(path.parent)
    assert tuning.config("rms_norm", columns=64) == LaunchConfig((("ROWS", 4),), num_warps=4)
    assert tuning.config("rms_norm", columns=65) == Tuning.read().config("rms_norm", columns=65)


def test_no_candidate_that_runs_is_an_error(tmp_path):
    def seconds(work):
        raise RuntimeError("too large")

    study = Study("norms", "rms_norm", [Shape({}, _norm(torch.ones(1, 4), torch.ones(4)))], [LaunchConfig()])
    with pytest.raises(ConfigError, match=r"no candidate of 'rms_norm' runs for \{\}; add smaller ones"):
        regenerate([study], tmp_path, InterpretedLauncher, seconds)


def test_what_is_measured_starts_the_kernel_it_is_about():
    for study in studies("meta", 8):
        for shape in study.shapes:
            recorder = Recorder(Tuning.read())
            shape.work(recorder)
            assert study.kernel in {found.name for found in recorder.recorded}


def _norm(x, weight):
    return lambda launch: norms.rms_norm(launch, x, weight, 1e-5, 0.0)
