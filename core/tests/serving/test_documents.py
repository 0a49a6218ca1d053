"""The requests that the documents show are answered by a server started as they say."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODEL = "examples/embedded_model/checkpoint"
ADDRESS = "http://127.0.0.1:8000"
READY = re.compile(r"ready at (http://\S+) after")


def shown_requests() -> list[str]:
    """Return the lines of `curl` in the documents."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs/serving.md")]
    return sorted({line for text in texts for line in text.splitlines() if line.startswith("curl ")})


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("zif_cpu")
    command = [sys.executable, "-m", "zif.cli", "serve", MODEL, "--port", "0"]
    environment = {**os.environ, "ZIF_CPU_THREADS": "1"}
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = iter(server.stdout.readline, "")
        found = next((match for match in map(READY.search, lines) if match), None)
        assert found, "the server ended before it was ready"
        yield found[1]
    finally:
        server.send_signal(signal.SIGTERM)
        rest, _ = server.communicate(timeout=60)
    assert server.returncode == 0, rest


@pytest.mark.slow
@pytest.mark.parametrize("line", shown_requests())
def test_a_request_that_is_shown_is_answered(line, address):
    assert ADDRESS in line
    words = [word.replace(ADDRESS, address) for word in shlex.split(line)]
    done = subprocess.run(
        [*words, "--silent", "--show-error", "--fail-with-body"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if '"stream": true' in line:
        assert done.stdout.rstrip().endswith("data: [DONE]")
        return
    answer = json.loads(done.stdout)
    assert answer["model"] == "checkpoint"
    assert "error" not in answer or answer["error"] is None
