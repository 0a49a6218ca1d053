"""Run schemathesis on /openapi.json of a real server: it makes requests from the document, and judges the answers.

    python core/tests/serving/http/schemathesis_run.py [--max-examples 20] [--seed 1]

schemathesis lives in an environment of its own, which this makes (in ~/.cache/zif/schemathesis) and uses again. The
server is `zif serve` with the null platform and a key for everything. What is checked: nothing is answered 500 or more;
every status, media type, header and body is as the document says; methods that a path does not have are refused, and
so is whoever has no key. Exit status 0 when all of it holds.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
import venv
from pathlib import Path

REQUIREMENT = "schemathesis==4.32.5"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
KEY = "a-key-of-this-run-only"
CHECKPOINT = Path(__file__).resolve().parents[4] / "examples" / "embedded_model" / "checkpoint"
SERVER = [
    "serve", str(CHECKPOINT), "--platform", "null", "--max-model-len", "256", "--port", "0", "--no-log-requests",
]  # fmt: skip


def prepared(folder: Path) -> Path:
    """Return the program `st` of an environment, made unless it is there."""
    marker = folder / ".made-from.json"
    program = folder / "bin" / "st"
    if not (marker.exists() and json.loads(marker.read_text()) == REQUIREMENT and program.exists()):
        print(f"making the environment of {REQUIREMENT} in {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        python = str(folder / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", REQUIREMENT], check=True)
        marker.write_text(json.dumps(REQUIREMENT))
    return program


def started(folder: Path) -> "tuple[subprocess.Popen[str], str]":
    """Return a server that is ready, and its address. Raises `RuntimeError` with what it said when it ends before."""
    keys = folder / "keys"
    keys.write_text(f"{KEY} scopes=inference,metrics,admin\n")
    command = [str(Path(sys.executable).with_name("zif")), *SERVER, "--api-key-file", str(keys)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    said = []
    for line in server.stdout:
        said.append(line)
        if "ready at" in line:
            # Nobody reads on, and a pipe that is full must not hold the server up.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, line.partition("ready at ")[2].split()[0]
    raise RuntimeError(f"the server ended with {server.wait()}:\n{''.join(said)}")


def document_of(address: str, folder: Path) -> Path:
    """Return the server's document as a file, in which requests ask for the model that is served."""
    with urllib.request.urlopen(f"{address}/openapi.json") as answer:
        document = json.load(answer)
    for name, schema in document["components"]["schemas"].items():
        if "model" in schema.get("properties", {}) and not name.startswith("answer."):
            schema["properties"]["model"] = {"const": CHECKPOINT.name}
    path = folder / "openapi.json"
    path.write_text(json.dumps(document))
    return path


def main() -> int:
    """Run schemathesis against a server of its own and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-examples", type=int, default=20, help="random requests of each operation")
    parser.add_argument("--phases", default="coverage,fuzzing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "zif" / "schemathesis")
    options = parser.parse_args()
    program = prepared(options.environment)
    with tempfile.TemporaryDirectory(prefix="zif-schemathesis-") as name:
        folder = Path(name)
        server, address = started(folder)
        try:
            command = [
                str(program), "run", str(document_of(address, folder)), "--url", address,
                "--checks", ",".join(CHECKS), "--header", f"Authorization: Bearer {KEY}",
                "--phases", options.phases, "--max-examples", str(options.max_examples), "--seed", str(options.seed),
                "--continue-on-failure", "--request-timeout", "60",
            ]  # fmt: skip
            return subprocess.run(command, check=False, cwd=folder).returncode
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
