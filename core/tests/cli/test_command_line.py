"""The command line itself: help, versions, errors, settings as options. No engine runs here."""

import argparse
import os
import subprocess
import sys
import time
import tomllib

import pytest

from zif import __version__
from zif.cli.main import main
from zif.cli.sampling_options import add_sampling_options, sampling_of
from zif.cli.setting_options import add_setting_options, settings_of
from zif.contract import SamplingParams
from zif.errors import ConfigError, EngineError
from zif.settings import setting_fields


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ZIF_")]:
        monkeypatch.delenv(name)


def _settings(*arguments):
    parser = argparse.ArgumentParser()
    add_setting_options(parser)
    return settings_of(parser.parse_args(arguments))


def _sampling(*arguments):
    parser = argparse.ArgumentParser()
    add_sampling_options(parser, max_tokens=7)
    return sampling_of(parser.parse_args(arguments))


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"zif {__version__}\n"


def test_help_is_quick_and_imports_no_array_library():
    script = (
        "import sys; from zif.cli.main import build_parser; build_parser().format_help(); print('torch' in sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    # A generous multiple of what it takes (0.12 s), because test machines are busy.
    assert time.perf_counter() - begin < 2.0


def test_every_setting_is_an_option_and_its_help_shows(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    for declared in setting_fields():
        assert declared.name == "model" or "--" + declared.name.replace("_", "-") in shown


def test_options_reach_the_settings():
    settings = _settings("folder", "--max-num-seqs", "3", "--no-enable-prefix-caching", "--kv-bytes", "1MiB")
    assert (settings.model, settings.max_num_seqs, settings.enable_prefix_caching) == ("folder", 3, False)
    assert settings.kv_bytes == 2**20


def test_options_reach_the_sampling_params():
    given = ["--temperature", "0", "--top-k", "5", "--request-seed", "9", "--stop", "a", "--stop", "b", "--ignore-eos"]
    expected = SamplingParams(temperature=0.0, top_k=5, seed=9, stop=["a", "b"], ignore_eos=True, max_tokens=7)
    assert _sampling(*given) == expected
    assert _sampling() == SamplingParams(max_tokens=7)


def test_a_sampling_value_out_of_range_is_a_usage_error():
    with pytest.raises(ConfigError, match=r"top_p=2\.0 is out of range"):
        _sampling("--top-p", "2")


def test_print_config_reads_back_and_names_origins(capsys, monkeypatch):
    monkeypatch.setenv("ZIF_MAX_MODEL_LEN", "64")
    assert main(["generate", "folder", "--print-config", "--max_num_seqs=5"]) == 0
    shown = capsys.readouterr().out
    assert "max_num_seqs = 5  # command line" in shown
    assert "max_model_len = 64  # environment ZIF_MAX_MODEL_LEN" in shown
    assert tomllib.loads(shown)["dtype"] == "auto"


def test_config_file_is_read(capsys, tmp_path):
    file = tmp_path / "zif.toml"
    file.write_text('model = "folder"\nseed = 3\n')
    assert main(["explain", "--config", str(file), "--print-config"]) == 0
    assert f"seed = 3  # file {file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x"], "model is not set"),
        (["generate", "m", "--prompt", "x", "--max-num-seqs", "0"], "max_num_seqs=0 is out of range"),
        (["generate", "m", "--prompt", "x", "--gpu-memory-utilization", "0.9"], "use kv_bytes"),
        (["generate", "m", "--prompt", "x", "--config", "/nowhere/zif.toml"], "check the path"),
        (["generate", "m", "--prompts-file", "/nowhere/prompts.txt"], "check the path"),
        (["generate", "m", "--prompt", "x", "--logprobs", "2"], "--output"),
        (["bench", "latency", "m", "--output-len", "1"], "--output-len 2 or more"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["generate", "m", "--max-token", "3"], "did you mean --max-tokens?"),
        (["generate", "m", "--top-k", "many"], "invalid int value"),
        (["bench", "throughput", "m", "--num-prompts", "0"], "must be at least 1"),
        (["platforms", "extra"], "unrecognized arguments: extra"),
    ],
)
def test_what_does_not_parse_is_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no valid JSON"),
        ("{}", "line 2: expected"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "line 2: expected"),
        ('{"prompt": 3}', "line 2: expected"),
        ('{"prompt_token_ids": ["a"]}', "line 2: expected"),
        ("[1]", "line 2: expected"),
    ],
)
def test_a_wrong_line_of_a_prompts_file_is_refused_by_number(line, message, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    assert main(["generate", "m", "--prompts-file", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_an_engine_error_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def fail(arguments):
        raise EngineError("the step loop stopped")

    monkeypatch.setattr("zif.cli.platforms.run", fail)
    assert main(["platforms"]) == 1
    assert capsys.readouterr().err == "error: the step loop stopped\n"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise KeyError("a fault of zif")

    monkeypatch.setattr("zif.cli.platforms.run", fail)
    with pytest.raises(KeyError):
        main(["platforms"])


def test_a_reader_that_goes_away_is_no_traceback():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "zif.cli", "platforms", "--json"]
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""
