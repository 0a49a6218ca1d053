"""What HTTP costs: short streaming completions against `zif serve` on the null platform, over kept connections.

    python benchmarks/http_overhead.py [--model FOLDER] [--connections 64] [--seconds 10] [--max-tokens 8]

The client is a few lines over sockets, so that it takes little of the machine that it shares with the server. Reported:
requests per second, time per request of client, HTTP process and engine process (CPU seconds, which do not depend on
what else runs), first byte and end of answers, and the longest time that `/livez` took meanwhile, which bounds the
stall of the server's event loop.
"""

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cpu.figures import percentile
from cpu.session import cpu_seconds

_REPOSITORY = Path(__file__).resolve().parents[1]
_MODEL = _REPOSITORY / "examples" / "embedded_model" / "checkpoint"
_PROBE_EVERY_S = 0.02
_END = b"\r\n0\r\n\r\n"
_EVENT = b"data:"


@dataclass(frozen=True, slots=True)
class Probe:
    """A route that costs a server next to nothing, and how its answer ends."""

    path: str
    end: bytes


LIVEZ = Probe("/livez", b"}")


class Connection:
    """One connection: asks, reads to the end of the answer, and asks again."""

    def __init__(self, path: str, request: bytes, end: bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.setblocking(False)
        self._request = request
        self._end = end
        self._tail = b""
        self.began_s = 0.0
        self.first_s = 0.0
        self.first_event_s = 0.0

    def ask(self) -> None:
        """Send the request."""
        self._tail = b""
        self.first_s = self.first_event_s = 0.0
        self.began_s = time.perf_counter()
        self.socket.sendall(self._request)

    def read(self) -> bool:
        """Take what came; say whether the answer is whole. Raises when it is no good one."""
        data = self.socket.recv(2**18)
        if not self.first_s:
            self.first_s = time.perf_counter()
            if not data.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the server answered {data[:300]!r}")
        elif not data:
            raise RuntimeError("the server closed the connection within an answer")
        if not self.first_event_s and _EVENT in data:
            self.first_event_s = time.perf_counter()
        self._tail = (self._tail + data)[-16:]
        return self._tail.endswith(self._end)


def request_bytes(path: str, body: bytes) -> bytes:
    """Return a whole request; without a body a GET."""
    if not body:
        return f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def load(path: str, body: bytes, num_connections: int, seconds: float, probed: Probe = LIVEZ) -> dict[str, float]:
    """Keep the connections busy for a while and return what was seen.

    First bytes are the answer's headers where a server sends them before it has a token; first events are not.
    Raises `RuntimeError` for an answer that is no good one, and when none came.
    """
    selector = selectors.DefaultSelector()
    asking = [Connection(path, request_bytes("/v1/completions", body), _END) for _ in range(num_connections)]
    probe = Connection(path, request_bytes(probed.path, b""), probed.end)
    for connection in [*asking, probe]:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.ask()
    first_s: list[float] = []
    first_event_s: list[float] = []
    end_s: list[float] = []
    probe_s: list[float] = []
    stop_s = time.perf_counter() + seconds
    probe_due_s = float("inf")
    while (now := time.perf_counter()) < stop_s:
        if now >= probe_due_s:
            probe_due_s = float("inf")
            probe.ask()
        for key, _ in selector.select(min(stop_s, probe_due_s) - now):
            connection = key.data
            if not connection.read():
                continue
            took_s = time.perf_counter() - connection.began_s
            if connection is probe:
                probe_s.append(took_s)
                probe_due_s = time.perf_counter() + _PROBE_EVERY_S
                continue
            end_s.append(took_s)
            first_s.append(connection.first_s - connection.began_s)
            first_event_s.append(connection.first_event_s - connection.began_s)
            connection.ask()
    if probe_due_s == float("inf"):  # still awaited, so it has taken that long already
        probe_s.append(time.perf_counter() - probe.began_s)
    for connection in [*asking, probe]:
        connection.socket.close()
    if not end_s:
        raise RuntimeError(f"no stream ended within {seconds:g} s")
    return {
        "requests_per_s": len(end_s) / seconds,
        "num_requests": len(end_s),
        **_percentiles("first_byte_ms", first_s),
        **_percentiles("first_event_ms", first_event_s),
        **_percentiles("end_ms", end_s),
        **_percentiles("probe_ms", probe_s),
        "longest_probe_ms": max(probe_s) * 1000,
    }


def _percentiles(name: str, seconds: list[float]) -> dict[str, float]:
    return {f"{name}_p{p}": percentile(seconds, p) * 1000 for p in (50, 99)}


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_ready(server: "subprocess.Popen[str]") -> str:
    """Return the line that says that the server is ready."""
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith("ready"):
            return line
    raise RuntimeError("the server did not start")


def main() -> None:
    """Start a server, load it, and print what was seen as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(_MODEL))
    parser.add_argument("--platform", default="null")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--max-tokens", type=int, default=8)
    options = parser.parse_args()
    body = json.dumps(
        {
            "model": "m",
            "prompt": list(range(10, 26)),
            "max_tokens": options.max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/s"
        command = [
            sys.executable,
            "-m",
            "zif.cli",
            "serve",
            options.model,
            "--platform",
            options.platform,
            "--uds",
            path,
        ]
        command += ["--served-model-name", "m", "--no-log-requests"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                ready = wait_ready(server)
                load(path, body, options.connections, 1.0)
                pids = {"client": os.getpid(), "http": server.pid, "engine": children(server.pid)[0]}
                before = {name: cpu_seconds(pid) for name, pid in pids.items()}
                seen = load(path, body, options.connections, options.seconds)
                for name, pid in pids.items():
                    seen[f"{name}_cpu_us_per_request"] = (cpu_seconds(pid) - before[name]) / seen["num_requests"] * 1e6
            finally:
                server.terminate()
    print(json.dumps({"ready": ready.strip(), **{name: round(value, 2) for name, value in seen.items()}}, indent=1))


if __name__ == "__main__":
    main()
