"""`zif generate` and `zif chat` end to end, on the platform that computes nothing: its text depends on every token."""

import codecs
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from zif import LLM, SamplingParams
from zif.cli.main import main

_MODEL = str(Path(__file__).resolve().parents[3] / "examples" / "embedded_model" / "checkpoint")
_NULL = ["--platform", "null", "--kv-bytes", "1MiB"]
_PROMPTS = ["Return a list of", "The name of the module", "Raise an error"]


@pytest.fixture(scope="module")
def expected():
    """Return the outputs that the library gives for the same prompts."""
    with LLM(_MODEL, platform="null", kv_bytes=2**20) as llm:
        return llm.generate(_PROMPTS, SamplingParams(max_tokens=8, temperature=0.0), use_tqdm=False)


def _generate(*arguments):
    return main(["generate", _MODEL, *_NULL, "--max-tokens", "8", "--temperature", "0", *map(str, arguments)])


def _read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_streams_its_text_and_nothing_else_to_stdout(expected, capsys):
    assert _generate("--prompt", _PROMPTS[0]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected[0].outputs[0].text + "\n"
    summary = captured.err.splitlines()[-1]
    assert f"{len(expected[0].prompt_token_ids)} prompt tokens, 8 output tokens" in summary
    assert "tokens/s" in summary
    assert "first token after" in summary


def test_several_prompts_print_in_order(expected, capsys):
    assert _generate("--prompt", *_PROMPTS) == 0
    shown = capsys.readouterr().out
    blocks = [f"[{i}] {p!r}\n{e.outputs[0].text}\n" for i, (p, e) in enumerate(zip(_PROMPTS, expected, strict=True))]
    assert shown == "".join(blocks)


def test_files_in_and_out(expected, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [{"prompt": _PROMPTS[0]}, {"prompt_token_ids": expected[1].prompt_token_ids, "note": "mine"}, _PROMPTS[2]]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _generate("--prompts-file", prompts, "--output", output) == 0
    results = _read(output)
    assert [r["index"] for r in results] == [0, 1, 2]
    assert [r["outputs"][0]["token_ids"] for r in results] == [e.outputs[0].token_ids for e in expected]
    assert {r["outputs"][0]["finish_reason"] for r in results} == {"length"}


def test_a_text_file_has_a_prompt_per_line(expected, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("\n\n".join(_PROMPTS))
    assert _generate("--prompts-file", prompts, "--output", output) == 0
    assert [r["outputs"][0]["text"] for r in _read(output)] == [e.outputs[0].text for e in expected]


def test_standard_input_is_one_prompt(expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(_PROMPTS[0] + "\n"))
    assert _generate() == 0
    assert capsys.readouterr().out == expected[0].outputs[0].text + "\n"


def test_empty_standard_input_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert _generate() == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_samples_and_logprobs_reach_the_file(tmp_path):
    output = tmp_path / "results.jsonl"
    assert _generate("--prompt", _PROMPTS[0], "--n", 2, "--output", output) == 0
    assert [len(result["outputs"]) for result in _read(output)] == [2]


def test_a_prompt_that_cannot_be_served_is_one_line_and_exit_code_1(capsys):
    assert _generate("--prompt", _PROMPTS[0], "--max-model-len", 2) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_an_output_file_that_cannot_be_written_is_refused_before_anything_runs(capsys, tmp_path):
    assert _generate("--prompt", _PROMPTS[0], "--output", tmp_path / "absent" / "results.jsonl") == 2
    assert capsys.readouterr().err.startswith("error: cannot write the output file")


def test_interrupted_it_keeps_what_is_finished(tmp_path):
    num_prompts = 3000
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [1 + i % 99, 5, 7]}) + "\n" for i in range(num_prompts)))
    options = ["--prompts-file", prompts, "--max-tokens", 64, "--temperature", 0, "--ignore-eos", "--max-num-seqs", 4]
    command = [sys.executable, "-m", "zif.cli", "generate", _MODEL, *_NULL, *map(str, options)]
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        os.close(stderr)
        errors = _read_until(terminal, rf"\b[1-9][0-9]*/{num_prompts}\b")
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate()
        errors += _read_until(terminal, r"tokens/s[^\n]*\n\Z")
    os.close(terminal)
    assert process.returncode == 130
    lines = shown.splitlines()
    finished = [line for line in lines if line.startswith("[")]
    assert finished[0] == "[0] 3 token ids"
    assert 0 < len(finished) < num_prompts
    assert "interrupted" in errors
    assert "Traceback" not in errors


def _read_until(terminal, pattern):
    """Return what a terminal shows up to a match of `pattern`, or all of it when the other side is gone."""
    shown, decoder = "", codecs.getincrementaldecoder("utf-8")()  # what is read may end within a character
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], 120)
        assert ready, f"nothing more on the terminal after {shown!r}"
        try:
            shown += decoder.decode(os.read(terminal, 4096))
        except OSError:  # Linux reports the end of a terminal this way.
            break
    return shown


def test_chat_over_a_pipe_keeps_and_resets_the_history(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n/reset\nfirst\n/exit\nnever\n"))
    assert main(["chat", _MODEL, *_NULL, "--max-tokens", "8", "--temperature", "0"]) == 0
    messages = [{"role": "user", "content": "first"}]
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    answers = []
    with LLM(_MODEL, platform="null", kv_bytes=2**20) as llm:
        for question in ("second", None):
            answers.append(llm.chat(messages, sampling, use_tqdm=False)[0].outputs[0].text)
            messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": question}]
    assert capsys.readouterr().out == f"{answers[0]}\n{answers[1]}\n{answers[0]}\n"


def test_chat_begins_with_the_system_message(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
    assert main(["chat", _MODEL, *_NULL, "--max-tokens", "8", "--temperature", "0", "--system", "Be brief."]) == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first"}]
    with LLM(_MODEL, platform="null", kv_bytes=2**20) as llm:
        output = llm.chat(messages, SamplingParams(max_tokens=8, temperature=0.0), use_tqdm=False)[0]
    assert capsys.readouterr().out == output.outputs[0].text + "\n"
