"""`zif serve` as a process: dry runs, faults that are seen before anything starts, and one whole life."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from serving.fakes import CHECKPOINT
from serving.http.servers import answer_of, get, post

MODEL = str(CHECKPOINT)


def zif(*arguments, environ=(), timeout=60):
    command = [sys.executable, "-m", "zif.cli", "serve", *arguments]
    environment = {**os.environ, **dict(environ)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_a_dry_run_prints_what_would_be_used():
    done = zif(MODEL, "--dry-run", "--print-config", "--port", "9", environ={"ZIF_SERVE_API_KEY": "hidden-key-1"})
    assert done.returncode == 0
    assert f'model = "{MODEL}"  # command line' in done.stdout
    assert "port = 9  # command line" in done.stdout
    assert "hidden-key" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([MODEL, "--api-key", "some-key-1"], "ZIF_SERVE_API_KEY"),
        (["/no/such/model"], "no folder with a config.json"),
        ([MODEL, "--host", "0.0.0.0"], "--insecure"),
        ([MODEL, "--port", "x"], "must be an integer"),
        ([MODEL, "--prot", "1"], "did you mean --port"),
        ([MODEL, "--tls-certificate", "/a", "--tls-key", "/b"], "cannot read tls_certificate='/a'"),
        ([MODEL, "--api-key-file", "/no/such"], "cannot read api_key_file"),
        ([MODEL, "--dry-run", "--kv-events-endpoint", "tcp://*:5557"], "kv_events_key_folder"),
        ([MODEL, "--dry-run", "--kv-events-topic", "x"], "without kv_events_endpoint"),
        ([MODEL, "--config", "/no/such"], "cannot read the settings file"),
        ([MODEL, "--tls-certificate", "/", "--tls-key", "/"], "cannot read tls_certificate='/': Is a directory"),
        ([MODEL, "--tls-certificate", __file__, "--tls-key", __file__], "no certificate in PEM"),
        ([MODEL, "--tls-certificate", __file__], "give both or neither"),
        ([MODEL, "--allowed-hosts", "http://a"], "without scheme and port"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(arguments, text):
    done = zif(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "some-key-1" not in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_num_seq = 4", "did you mean max_num_seqs"),
        ("[serve]\nmax_body_byte = 4096", "did you mean max_body_bytes"),
        ("[serve]\nmax_num_seqs = 4", "put it above the table"),
        ("model = [", "zif.toml"),
    ],
)
def test_a_wrong_settings_file_is_one_clear_line(tmp_path, text, expected):
    file = tmp_path / "zif.toml"
    file.write_text(text)
    done = zif(MODEL, "--config", str(file))
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_is_seen_before_the_engine_starts():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = zif(MODEL, "--port", str(port), "--platform", "null")
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: port={port} of '127.0.0.1' is in use; choose another with --port, or 0 for any free one\n"
    )


@pytest.mark.slow
def test_a_whole_life(tmp_path):
    path = str(tmp_path / "s")
    command = [sys.executable, "-m", "zif.cli", "serve", MODEL, "--platform", "null", "--uds", path]
    command += ["--max-body-bytes", "65536"]
    began_s = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if line.startswith("ready at"):
                    break
            print(f"ready after {time.monotonic() - began_s:.1f} s", lines)
            assert any(line.startswith("loading weights") for line in lines)
            asyncio.run(_ask(path))
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()
    assert not os.path.exists(path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["leaves", "stands still"])
def test_who_reads_standard_error_does_not_decide_how_the_server_ends(tmp_path, reader):
    path = str(tmp_path / "s")
    command = [sys.executable, "-m", "zif.cli", "serve", MODEL, "--platform", "null", "--uds", path]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, pipesize=4096, env=environment) as server:
        try:
            while not server.stderr.readline().startswith(b"ready at"):
                pass
            if reader == "leaves":
                server.stderr.close()
            asyncio.run(_ask_for_nothing(path, num_times=200))
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()


async def _ask_for_nothing(uds, num_times):
    """Make requests that each give a line of log."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_unix_connection(uds)
        for _ in range(num_times):
            writer.write(get("/v1/nothing"))
            assert (await answer_of(reader))[0] == 404
        writer.close()


async def _ask(uds):
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_unix_connection(uds)
        for request in (
            get("/readyz"),
            get("/v1/models"),
            get("/metrics"),
            get("/props"),
            get("/openapi.json"),
            get("/"),
        ):
            writer.write(request)
            assert (await answer_of(reader))[0] == 200
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
        writer.write(post("/v1/completions", body))
        status, _, content = await answer_of(reader)
        assert (status, b'"completion_tokens":4' in content) == (200, True)
        for bad, expected, code in (
            (b'{"prompt": "\xff"}', 400, "invalid_utf8"),
            (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "invalid_json"),
            (b'{"prompt": "x"', 400, "invalid_json"),
            (b'{"prompt": "' + b"x" * 70_000 + b'"}', 413, "body_too_large"),
        ):
            writer.write(post("/v1/completions", bad))
            status, _, content = await answer_of(reader)
            assert (status, json.loads(content)["error"]["code"]) == (expected, code)
        writer.write(post("/v1/completions", body | {"stream": True}, "connection: close"))
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
