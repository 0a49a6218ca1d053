"""`zif serve` as a process: dry runs, faults that are seen before anything starts, and one whole life."""

import asyncio
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
    ],
)
def test_a_wrong_command_line_is_one_clear_line(arguments, text):
    done = zif(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "some-key-1" not in done.stderr


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
        writer.write(post("/v1/completions", body | {"stream": True}, "connection: close"))
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
