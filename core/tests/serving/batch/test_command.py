"""`zif batch` as a command: the server's answers, without a network, from files and pipes, and again after kills."""

import asyncio
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.fakes import CHECKPOINT
from serving.http.servers import answer_of, post
from zif.cli.main import main


def load_batch_kills():
    spec = importlib.util.spec_from_file_location("batch_kills", Path(__file__).with_name("batch_kills.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_kills"] = module
    spec.loader.exec_module(module)
    return module


batch_kills = load_batch_kills()

MODEL = [str(CHECKPOINT), "--max-model-len", "256", "--kv-bytes", "4MiB"]
NULL = [*MODEL, "--platform", "null"]
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
HELLO = [{"role": "user", "content": "Hello"}]
BODIES = [
    ("/v1/completions", {"prompt": ["Return a", "Raise"], "max_tokens": 6, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 9, "n": 3, "seed": 4, "temperature": 1}),
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "stop": ["e"]}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 30, "response_format": FORM}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 9}),
    ("/v1/messages", {"model": "checkpoint", "messages": HELLO, "max_tokens": 9}),
    ("/v1/messages", {"messages": HELLO}),
    ("/tokenize", {"prompt": "Return a list"}),
]

NO_NETWORK = """
import sys

def look(event, arguments):
    if event == "socket.__new__" and arguments[1] in (2, 10) or event == "socket.getaddrinfo":
        sys.stderr.write("a socket of the network is made\\n")
        raise SystemExit(99)

sys.addaudithook(look)
"""


@pytest.fixture
def files(tmp_path):
    """Give the file of requests and the file of answers, neither of which is there yet."""
    return tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"


def write(path, bodies):
    lines = [
        {"custom_id": f"r{k}", "method": "POST", "url": url, "body": {"temperature": 0} | body}
        for k, (url, body) in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def batch(files, *options, model=NULL):
    requests, answers = map(str, files)
    return main(["batch", *model, "--input", requests, "--output", answers, *options])


def test_a_file_is_answered_once_and_failures_go_where_they_are_asked_to(files, tmp_path, capsys):
    write(files[0], BODIES)
    errors = ["--errors", str(tmp_path / "errors.jsonl")]
    assert batch(files, *errors, "--ordered") == 0
    assert [answer["custom_id"] for answer in read(files[1])] == ["r0", "r1", "r3", "r4", "r6", "r7", "r9"]
    assert [answer["response"]["status_code"] for answer in read(tmp_path / "errors.jsonl")] == [400] * 3
    assert "10 requests, 3 failed" in capsys.readouterr().err.splitlines()[-1]
    before = files[1].read_bytes()
    assert batch(files, *errors, "--fail-on-error") == 1
    assert files[1].read_bytes() == before
    assert "10 of 10 requests are answered already" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--platform", "null"], ["--platform", "cpu", "--batch-invariant"]])
def test_answers_are_those_of_the_server_and_no_socket_of_the_network_is_made(options, files, tmp_path):
    model = [*MODEL, *options]
    asked = write(files[0], [*BODIES, ("/v1/embeddings", {"input": "Hello"})])
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    command = [sys.executable, "-m", "zif.cli", "batch", *model, "--input", str(files[0]), "--output", str(files[1])]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    path = str(tmp_path / "s")
    with subprocess.Popen(
        [sys.executable, "-m", "zif.cli", "serve", *model, "--uds", path], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert any(line.startswith("ready at") for line in server.stderr)
            served = asyncio.run(_served(path, asked))
            server.send_signal(signal.SIGTERM)
            server.stderr.read()
        finally:
            server.kill()
    answers = {answer["custom_id"]: answer["response"] for answer in read(files[1])}
    for request in asked:
        status, body = served[request["custom_id"]]
        answer = answers[request["custom_id"]]
        assert answer["status_code"] == status
        assert batch_kills.content_of(answer["body"]) == batch_kills.content_of(body)


async def _served(uds, asked):
    """Return what a server answers to the same bodies, one after another."""
    given = {}
    async with asyncio.timeout(60):
        for request in asked:
            reader, writer = await asyncio.open_unix_connection(uds)
            writer.write(post(request["url"], request["body"]))
            status, _, content = await answer_of(reader)
            given[request["custom_id"]] = status, json.loads(content)
            writer.close()
    return given


def test_requests_come_from_a_pipe_and_answers_go_to_one(files, capfdbinary, monkeypatch):
    write(files[0], BODIES[:2])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(files[0].read_bytes())))
    assert main(["batch", *NULL, "--input", "-", "--output", "-"]) == 0
    lines = capfdbinary.readouterr().out.splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in lines) == ["r0", "r1"]


def test_nothing_that_guards_a_socket_is_looked_at(files, capsys, monkeypatch):
    monkeypatch.setenv("ZIF_SERVE_API_KEY", " ")
    monkeypatch.setenv("ZIF_SERVE_HOST", "0.0.0.0")
    assert batch(files, "--print-config") == 0
    assert "# API keys: 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--input", "/no/such"], "cannot read the file '/no/such'"),
        (["--output", "/no/such/file"], "cannot write the file '/no/such/file'"),
        (["--input", __file__, "--output", __file__], "is no answer of a batch"),
        (["--max-body-bytes", "x"], "max_body_bytes"),
        (["--errors", "/dev/full", "--output", "/dev/full"], "cannot take both"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(files, capsys, options, text):
    write(files[0], BODIES)
    assert batch(files, *options) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_model_that_does_not_load_is_said_and_nothing_is_written(files, capsys):
    write(files[0], BODIES)
    assert batch(files, "--max-model-len", "100000000") == 1
    assert "max_model_len" in capsys.readouterr().err
    assert files[1].read_bytes() == b""


@pytest.mark.slow
def test_after_kills_each_request_has_one_answer(tmp_path):
    done = batch_kills.work_through(random.Random(2), tmp_path, num_requests=150, max_kills=3)
    assert done.problems == []
    assert done.num_starts > 1
