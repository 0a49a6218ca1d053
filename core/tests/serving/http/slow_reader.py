"""Clients that read a byte a second, and clients that leave, against a real server: do others notice?

    python core/tests/serving/http/slow_reader.py [--readers 8] [--rounds 3] [--leavers 200] [--write-timeout 10]

The server runs on the null platform. A steady client asks short requests one by one, alone at first and then beside
readers that each asked for much more than buffers hold and take a byte a second. What must hold: every such reader is
ended by the write timeout; while they stall, the steady client waits no longer than before; the memory of no process
grows, within the stall and from round to round; and when all of them and a crowd of leaving clients are gone, nothing
runs and no KV block is in use. Prints each verdict with its figures; the exit code is 0 when all hold.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

MODEL = Path(__file__).resolve().parents[4] / "examples/embedded_model/checkpoint"
NUM_RECEIVE_BYTES = 4096
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "n": 4, "logprobs": 5, "stream": True}
SHORT = {"prompt": [8, 9], "max_tokens": 8, "ignore_eos": True}
STALL_MIB, ROUNDS_MIB = 4.0, 24.0
"""How much a process may grow while readers only stall, and from the first round to the end."""

SETTLE_S = 10.0
LATE_S = 2.0
"""How long after its due time an end may come: the machine has other work."""

SLOWER, SLOWER_S = 1.5, 0.005
"""The steady client's waits may be this many times longer, and this much, in the best round: what slows them does so in
each, other work of the machine does not. A round in which the engine was never idle tells nothing."""

NUM_ALONE = 100
QUIET_S = 1.0
"""For so long the engine has nothing to do before it counts as idle: twice as long as it takes to say so."""


@dataclass(frozen=True, slots=True)
class Options:
    """How many of everything, and the server's write timeout in seconds."""

    readers: int = 8
    rounds: int = 3
    leavers: int = 200
    write_timeout: int = 10


@dataclass(slots=True)
class Verdict:
    """What was found: whether each claim holds, and lines with the figures."""

    holds: dict[str, bool] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def judge(self, name: str, holds: bool, figures: str) -> None:
        self.holds[name] = holds
        self.lines.append(f"{'holds' if holds else 'FAILS'}  {name}: {figures}")


@dataclass(slots=True)
class Round:
    """One round of slow readers: when each was ended, and waits and memory while they stalled."""

    alone_s: list[float] = field(default_factory=list)
    """Waits of the steady client just before."""

    ends_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    mib: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: its process and its port."""

    pid: int
    port: int

    async def answer(self, request: bytes) -> bytes:
        """Make one request and return the whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        try:
            return await reader.read()
        finally:
            writer.close()

    async def gauge(self, name: str) -> float:
        """Return a gauge of the metrics."""
        text = (await self.answer(_get("/metrics"))).decode()
        return float(re.findall(rf"^zif:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0])

    async def wait_s(self) -> float:
        """Ask a short request and return how long it took."""
        began_s = time.perf_counter()
        assert b" 200 OK" in await self.answer(_post(SHORT))
        return time.perf_counter() - began_s

    def mib(self) -> dict[str, float]:
        """Return the resident memory of the server's processes, in MiB."""
        pids = {"http": self.pid}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError):
                if entry.name.isdigit() and int(_stat(entry)[1]) == self.pid:
                    command = (entry / "cmdline").read_text()
                    pids |= {"engine": int(entry.name)} if "zif.serving.engine.process" in command else {}
        return {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) / 256 for name, pid in pids.items()}


@contextlib.asynccontextmanager
async def served(options: Options) -> AsyncGenerator[Server, None]:
    """Run a server; it must end well."""
    command = [sys.executable, "-m", "zif.cli", "serve", str(MODEL), "--platform", "null", "--port", "0"]
    command += [f"--write-timeout-s={options.write_timeout}", "--no-log-requests"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            ready = next((line for line in process.stderr if line.startswith("ready at")), "")
            assert ready, "the server did not start"
            # Its log is read, so that it never waits for us.
            asyncio.get_running_loop().run_in_executor(None, process.stderr.read)
            yield Server(process.pid, int(re.findall(r":(\d+) after", ready)[0]))
            process.terminate()
            assert await asyncio.to_thread(process.wait, 30) == 0, "the server did not end well"
        finally:
            process.kill()


async def read_slowly(server: Server, limit_s: float, begun: list[float]) -> float:
    """Ask for a long answer, read a byte a second, and return after how many seconds the server ended it.

    Puts into `begun` when its first byte came.
    """
    loop = asyncio.get_running_loop()
    with _connected(server.port) as client:
        await loop.sock_sendall(client, _post(LONG))
        await loop.sock_recv(client, 1)
        began_s = read_s = time.monotonic()
        begun.append(began_s)
        while time.monotonic() < began_s + limit_s:
            await asyncio.sleep(0.05)
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return time.monotonic() - began_s
            if time.monotonic() > read_s + 1:
                read_s += 1
                client.recv(1)
    return float("inf")


async def leave(server: Server, chance: random.Random) -> None:
    """Ask for a long answer, read a little of it or nothing, and be gone."""
    loop = asyncio.get_running_loop()
    with _connected(server.port) as client:
        await loop.sock_sendall(client, _post(LONG)[: chance.choice((100, 10**6, 10**6, 10**6))])
        await asyncio.sleep(chance.uniform(0, 0.2))
        if chance.random() < 0.5:
            with contextlib.suppress(BlockingIOError):
                client.recv(NUM_RECEIVE_BYTES)
        if chance.random() < 0.5:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def look(server: Server, found: Round) -> None:
    """Take one wait of the steady client, and memory."""
    found.waits_s.append(await server.wait_s())
    found.mib.append(server.mib())


async def stall(server: Server, options: Options) -> Round:
    """Have readers stall, and watch while they do nothing else."""
    found = Round(alone_s=[await server.wait_s() for _ in range(NUM_ALONE)])
    limit_s = 3 * options.write_timeout + 150
    begun: list[float] = []
    readers = [asyncio.create_task(read_slowly(server, limit_s, begun)) for _ in range(options.readers)]
    # What they asked for is computed as for anybody; here it is about what comes after.
    quiet_since_s = time.monotonic()
    while len(begun) < options.readers or time.monotonic() < quiet_since_s + QUIET_S:
        await asyncio.sleep(0.05)
        if await server.gauge("num_requests_running"):
            quiet_since_s = time.monotonic()
    while not any(reader.done() for reader in readers):
        await look(server, found)
    found.ends_s = await asyncio.gather(*readers)
    return found


async def measure(options: Options) -> Verdict:
    """Run all of it and judge."""
    verdict = Verdict()
    async with served(options) as server:
        await asyncio.gather(
            *(server.answer(_post(LONG)) for _ in range(options.readers))
        )  # memory at its usual height
        before_mib = server.mib()
        rounds = [await stall(server, options) for _ in range(options.rounds)]
        chance = random.Random(0)
        for _ in range(0, options.leavers, 50):
            await asyncio.gather(*(leave(server, chance) for _ in range(min(50, options.leavers))))
        in_use = await _settled(server)
        after_mib = server.mib()
        _judge_ends(verdict, rounds, options)
        _judge_waits(verdict, rounds)
        _judge_memory(verdict, rounds, before_mib, after_mib)
        verdict.judge("nothing is left in use", not any(in_use.values()), str(in_use))
        await server.wait_s()
    return verdict


async def _settled(server: Server) -> dict[str, float]:
    """Wait until nothing is in use, or `SETTLE_S`; return what is."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    deadline_s = time.monotonic() + SETTLE_S
    while any((in_use := {name: await server.gauge(name) for name in names}).values()):
        if time.monotonic() > deadline_s:
            break
        await asyncio.sleep(0.2)
    return in_use


def _judge_ends(verdict: Verdict, rounds: list[Round], options: Options) -> None:
    ends_s = [end_s for one in rounds for end_s in one.ends_s]
    figures = f"{len(ends_s)} readers, after {min(ends_s):.1f} to {max(ends_s):.1f} s of {options.write_timeout}"
    ended = all(options.write_timeout <= end_s < float("inf") for end_s in ends_s)
    verdict.judge("slow readers are ended by the write timeout", ended, figures)
    # The time counts from when much waits, after the first byte came: how soon that is, the engine decides too.
    in_time = max(ends_s) <= 2 * options.write_timeout + LATE_S
    verdict.judge("and soon", in_time, f"at most {LATE_S} s after twice the timeout")


def _judge_waits(verdict: Verdict, rounds: list[Round]) -> None:
    num_beside = sum(len(one.waits_s) for one in rounds)
    figures = [f"{num_beside} waits beside them"]
    holds = num_beside > 0
    for name, pick in (("median", median), ("9 of 10", _nine_of_ten)):
        pairs = [(pick(one.alone_s), pick(one.waits_s)) for one in rounds if one.waits_s]
        holds &= any(beside_s <= SLOWER * alone_s + SLOWER_S for alone_s, beside_s in pairs)
        figures.append(
            f"{name} " + ", ".join(f"{alone * 1e3:.1f} -> {beside * 1e3:.1f}" for alone, beside in pairs) + " ms"
        )
    verdict.judge("others are not slowed", holds, "; ".join(figures))


def _judge_memory(
    verdict: Verdict, rounds: list[Round], before_mib: dict[str, float], after_mib: dict[str, float]
) -> None:
    rounds = [one for one in rounds if one.mib]
    for name in ("http", "engine"):
        within = max((max(mib[name] for mib in one.mib) - one.mib[0][name] for one in rounds), default=0.0)
        across = after_mib[name] - before_mib[name]
        figures = f"{before_mib[name]:.1f} MiB, {within:+.1f} within a stall, {across:+.1f} over all"
        verdict.judge(f"memory of {name} is flat", within <= STALL_MIB and across <= ROUNDS_MIB, figures)


def _nine_of_ten(values: list[float]) -> float:
    return sorted(values)[len(values) * 9 // 10]


def _connected(port: int) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NUM_RECEIVE_BYTES)
    client.connect(("127.0.0.1", port))
    client.setblocking(False)
    return client


def _post(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


def _stat(entry: Path) -> list[str]:
    """Return what proc(5) has of a process, from its state on."""
    return (entry / "stat").read_text().rsplit(")", 1)[1].split()


def main() -> int:
    """Measure as asked and print the verdict. 0 when all holds."""
    parser = argparse.ArgumentParser()
    for name, default in (("readers", 8), ("rounds", 3), ("leavers", 200), ("write-timeout", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    verdict = asyncio.run(measure(Options(**vars(parser.parse_args()))))
    print("\n".join(verdict.lines))
    return 0 if all(verdict.holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
