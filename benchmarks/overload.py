"""Ten times what a server can answer, for minutes: what it still answers, how fast it turns away, what it keeps.

    python benchmarks/overload.py [--platform cpu] [--seconds 180] [--factor 10] [--objective 10]

Starts `zif serve` with the model in examples/. First the peak: connections that ask again as soon as they are answered
(closed loop), as many as run and wait at once at most, and the best rate of whole answers within the objective. Then
requests at ten times that rate, come what may (open loop, Poisson), over TCP. The verdict, and the exit status:

- goodput, the whole answers within the objective, at 90 % of the peak or more;
- all others turned away with 429 or 503 and Retry-After, within 50 ms at the 99th percentile and at the most;
- memory of every process flat after the first quarter: neither the slope nor a peak adds more than a share of it.

The client shares the machine: it is one thread over epoll, and when an answer came is the kernel's word
(SO_TIMESTAMPING), so that its own delays count neither for nor against the server. How late it sent is told, and how
long the HTTP process was ready to run and another process ran: on a machine that is not quiet both are large. The
engine computes with one thread, which leaves the second core of a small machine to HTTP and the client. Where `null` is
the platform the HTTP process is what saturates, and no server written in Python turns away ten times that.
"""

import argparse
import contextlib
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cpu.figures import percentile
from cpu.session import cpu_seconds
from http_overhead import children, wait_ready

_MODEL = Path(__file__).resolve().parents[1] / "examples" / "embedded_model" / "checkpoint"
_SO_TIMESTAMPING = 37
_RX_SOFTWARE = 1 << 3 | 1 << 4
"""SOF_TIMESTAMPING_RX_SOFTWARE and SOF_TIMESTAMPING_SOFTWARE: Linux, Documentation/networking/timestamping.rst."""

_MAX_CONNECTIONS = 4000
_MAX_PER_TURN = 32
"""Requests that are sent before answers are looked at again."""

GOODPUT_SHARE = 0.9
REJECTION_LIMIT_S = 0.05
GROWTH_SHARE = 0.05
GROWTH_BYTES = 4 << 20
"""Memory may grow by the larger of these two."""


class Connection:
    """One connection and the request that it waits for."""

    __slots__ = ("data", "sent_ns", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _RX_SOFTWARE)
        self.sent_ns = 0
        self.data = b""

    def send(self, request: bytes) -> None:
        """Ask."""
        self.data = b""
        self.sent_ns = time.time_ns()
        self.socket.sendall(request)

    def receive(self) -> int:
        """Take what came. Return when its last part had arrived, in ns of the wall clock; 0 when the server closed."""
        data, ancillary, _, _ = self.socket.recvmsg(65536, 256)
        if not data:
            return 0
        self.data = self.data + data if self.data else data
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPING:
                seconds, nanoseconds = struct.unpack_from("qq", content)
                return int(seconds * 10**9 + nanoseconds)
        return time.time_ns()

    def is_whole(self) -> bool:
        """Say whether the answer has as many bytes as it says."""
        head = self.data.find(b"\r\n\r\n")
        field_at = self.data.find(b"content-length: ", 0, head)
        if head < 0 or field_at < 0:
            return False
        length = self.data[field_at + 16 : self.data.index(b"\r\n", field_at)]
        return len(self.data) - head - 4 >= int(length)


@dataclass
class Seen:
    """What became of the requests of one phase. Times in seconds."""

    num_sent: int = 0
    num_good: int = 0
    num_late: int = 0
    num_lost: int = 0
    num_not_sent: int = 0
    answer_s: list[float] = field(default_factory=list)
    rejection_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)

    def add(self, connection: Connection, arrived_ns: int, objective_s: float) -> None:
        """Count a whole answer."""
        status, took_s = connection.data[9:12], (arrived_ns - connection.sent_ns) / 1e9
        if status == b"200":
            self.answer_s.append(took_s)
            self.num_good += took_s <= objective_s
            self.num_late += took_s > objective_s
        elif status in (b"429", b"503") and b"\r\nretry-after: " in connection.data:
            self.rejection_s.append(took_s)
        else:
            kind = status.decode()
            self.others[kind] = self.others.get(kind, 0) + 1


class Client:
    """Kept connections to one server, each with one request at a time."""

    def __init__(self, port: int, request: bytes, objective_s: float) -> None:
        self._port = port
        self._request = request
        self._objective_s = objective_s
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._idle: list[Connection] = []

    def closed_loop(self, num_connections: int, seconds: float) -> Seen:
        """Keep so many requests under way."""
        seen = Seen()
        for _ in range(num_connections):
            self._send(seen)
        stop_s = time.monotonic() + seconds
        while (left_s := stop_s - time.monotonic()) > 0:
            for _ in range(self._receive(left_s, seen)):
                self._send(seen)
        self._drain()
        return seen

    def open_loop(self, rate: float, seconds: float, chance: random.Random, every_second: Callable[[], None]) -> Seen:
        """Send at a rate, whatever comes back."""
        seen = Seen()
        begin_s = due_s = told_s = time.monotonic()
        while (now := time.monotonic()) < begin_s + seconds:
            num_sent = 0
            while due_s <= now and num_sent < _MAX_PER_TURN:
                seen.lag_s.append(now - due_s)
                self._send(seen)
                due_s += chance.expovariate(rate)
                num_sent += 1
            self._receive(max(0.0, min(due_s - time.monotonic(), 1.0)), seen)
            if now >= told_s + 1:
                told_s = now
                every_second()
        # What was taken is still answered; nothing of it counts, but what is lost does.
        before = seen.num_good
        self._drain(seen)
        seen.num_good = before
        return seen

    def _send(self, seen: Seen) -> None:
        if self._idle:
            connection = self._idle.pop()
        elif len(self._connections) < _MAX_CONNECTIONS:
            connection = Connection(self._port)
            self._connections[connection.socket.fileno()] = connection
            self._poll.register(connection.socket.fileno(), select.EPOLLIN)
        else:
            seen.num_not_sent += 1
            return
        seen.num_sent += 1
        try:
            connection.send(self._request)
        except OSError:
            # Closed by the server a moment ago, as one may that is idle.
            self._idle.append(connection)
            self._forget(connection, seen)
            seen.num_sent -= 1
            self._send(seen)

    def _receive(self, timeout_s: float, seen: Seen) -> int:
        """Take what has come. Returns how many answers are whole."""
        num_whole = 0
        for number, _ in self._poll.poll(timeout_s):
            connection = self._connections[number]
            arrived_ns = connection.receive()
            if not arrived_ns:
                self._forget(connection, seen)
            elif connection.is_whole():
                seen.add(connection, arrived_ns, self._objective_s)
                self._idle.append(connection)
                num_whole += 1
        return num_whole

    def _forget(self, connection: Connection, seen: Seen) -> None:
        """Close what the server has closed; a request that was under way is lost."""
        self._poll.unregister(connection.socket.fileno())
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        if connection in self._idle:
            self._idle.remove(connection)
        else:
            seen.num_lost += 1

    def _drain(self, seen: Seen | None = None) -> None:
        """Wait for the answers that are under way; those that do not come within the objective and a bit are lost."""
        seen = Seen() if seen is None else seen
        stop_s = time.monotonic() + self._objective_s + 5
        while len(self._idle) < len(self._connections) and (left_s := stop_s - time.monotonic()) > 0:
            self._receive(left_s, seen)
        seen.num_lost += len(self._connections) - len(self._idle)


class Memory:
    """Resident memory of processes, sampled, in bytes."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.samples: dict[str, list[tuple[float, int]]] = {name: [] for name in pids}

    def sample(self) -> None:
        """Read all of them (proc(5), statm)."""
        for name, pid in self._pids.items():
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            self.samples[name].append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE")))

    def growth(self, name: str) -> dict[str, float]:
        """Return size, growth by the fitted slope, and peak over trough, in bytes, without the first quarter."""
        samples = self.samples[name][len(self.samples[name]) // 4 :]
        times, sizes = [time_s for time_s, _ in samples], [size for _, size in samples]
        mean_s, mean = sum(times) / len(times), sum(sizes) / len(sizes)
        spread = sum((time_s - mean_s) ** 2 for time_s in times)
        slope = sum((t - mean_s) * (s - mean) for t, s in samples) / spread if spread else 0.0
        return {"bytes": mean, "slope": slope * (times[-1] - times[0]), "span": float(max(sizes) - min(sizes))}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up: its port, and its processes by name."""

    port: int
    pids: dict[str, int]


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[Server]:
    """Run `zif serve`, and end it."""
    command = [sys.executable, "-m", "zif.cli", "serve", options.model, "--platform", options.platform]
    command += ["--port", "0", "--served-model-name", "m", "--no-log-requests"]
    command += ["--max-num-seqs", str(options.seqs), "--max-queued-requests", str(options.queue)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            port = int(wait_ready(server).split(" after")[0].rpartition(":")[2])
            engine, *others = children(server.pid)
            helpers = {f"helper {number}": pid for number, pid in enumerate(others, start=1)}
            yield Server(port, {"http": server.pid, "engine": engine, **helpers})
        finally:
            server.terminate()


def request_of(max_tokens: int) -> bytes:
    """Return the one request that is sent."""
    asked = {"model": "m", "prompt": list(range(10, 26)), "max_tokens": max_tokens, "ignore_eos": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def peak_rates(client: Client, options: argparse.Namespace) -> dict[int, float]:
    """Return the goodput per second by number of connections, after a warm-up. Raises `RuntimeError` without any."""
    client.closed_loop(options.seqs, options.peak_seconds / 2)
    rates = {}
    for number in (options.seqs, options.seqs + options.queue // 2, options.seqs + options.queue):
        seen = client.closed_loop(number, options.peak_seconds)
        if not seen.num_good:
            told = f"{seen.num_late} late, {seen.num_lost} lost, {len(seen.rejection_s)} refused, {seen.others}"
            raise RuntimeError(f"no answer of {number} connections is whole within {options.objective:g} s: {told}")
        rates[number] = seen.num_good / options.peak_seconds
    return rates


def waited_seconds(pid: int) -> float:
    """Return how long a process's main thread was ready to run and did not (Linux, scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def measure(options: argparse.Namespace, server: Server) -> dict[str, object]:
    """Find the peak, overload the server, and return the report, whose `faults` are what fails the proof."""
    client = Client(server.port, request_of(options.max_tokens), options.objective)
    peaks = peak_rates(client, options)
    peak = max(peaks.values())
    pids = {**server.pids, "client": os.getpid()}
    memory, before = Memory(server.pids), {name: cpu_seconds(pid) for name, pid in pids.items()}
    waited_before_s = waited_seconds(server.pids["http"])
    memory.sample()
    seen = client.open_loop(peak * options.factor, options.seconds, random.Random(options.seed), memory.sample)
    waited_s = waited_seconds(server.pids["http"]) - waited_before_s
    used = {name: (cpu_seconds(pid) - before[name]) / options.seconds for name, pid in pids.items()}
    growths = {name: memory.growth(name) for name in server.pids}
    return {
        "peak_per_s": round(peak, 2),
        "closed_loops_per_s": {number: round(rate, 2) for number, rate in peaks.items()},
        "offered_per_s": round(seen.num_sent / options.seconds, 1),
        "goodput_per_s": round(seen.num_good / options.seconds, 2),
        "goodput_share": round(seen.num_good / options.seconds / peak, 3),
        "answers": {"good": seen.num_good, "late": seen.num_late, **_milliseconds(seen.answer_s)},
        "rejections": {"number": len(seen.rejection_s), **_milliseconds(seen.rejection_s)},
        "others": {"lost": seen.num_lost, "not sent": seen.num_not_sent, **seen.others},
        "client_lag": _milliseconds(seen.lag_s),
        "http_waited_for_a_core": round(waited_s / options.seconds, 3),
        "cores_used": {name: round(cores, 2) for name, cores in used.items()},
        "memory_mb": {n: {k: round(v / 2**20, 2) for k, v in growth.items()} for n, growth in growths.items()},
        "faults": _faults(seen, seen.num_good / options.seconds / peak, growths),
    }


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    worst = {"max_ms": round(max(seconds) * 1000, 1)}
    return {f"p{p}_ms": round(percentile(seconds, p) * 1000, 1) for p in (50, 99)} | worst


def _faults(seen: Seen, goodput_share: float, growths: dict[str, dict[str, float]]) -> list[str]:
    """Say what is not as it must be."""
    faults = []
    if goodput_share < GOODPUT_SHARE:
        faults.append(f"goodput is {goodput_share:.0%} of the peak and must be {GOODPUT_SHARE:.0%}")
    if not seen.rejection_s:
        faults.append("nothing was turned away: this was no overload")
    elif max(seen.rejection_s) > REJECTION_LIMIT_S:
        num_slow = sum(took_s > REJECTION_LIMIT_S for took_s in seen.rejection_s)
        worst = f"the slowest of {len(seen.rejection_s)} took {max(seen.rejection_s) * 1000:.0f} ms"
        faults.append(f"{num_slow} rejections took more than {REJECTION_LIMIT_S * 1000:.0f} ms, {worst}")
    if seen.num_lost or seen.others:
        faults.append(f"{seen.num_lost} requests were lost, and others answered {seen.others}")
    for name, growth in growths.items():
        allowed = max(GROWTH_BYTES, GROWTH_SHARE * growth["bytes"])
        if max(growth["slope"], growth["span"]) > allowed:
            slope, span = growth["slope"] / 2**20, growth["span"] / 2**20
            faults.append(f"memory of {name} grew by {slope:.1f} MB and moved by {span:.1f} MB")
    return faults


def main() -> int:
    """Measure, print the report as JSON and the verdict. 0 when all holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(_MODEL))
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--peak-seconds", type=float, default=20.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--objective", type=float, default=10.0, help="seconds that a whole answer may take")
    parser.add_argument("--seqs", type=int, default=16, help="samples that run at once")
    parser.add_argument("--queue", type=int, default=32, help="samples that may wait")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(options) as server:
        report = measure(options, server)
    print(json.dumps(report, indent=1))
    faults = report["faults"]
    print("all holds" if not faults else "FAILED: " + "; ".join(map(str, faults)))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
