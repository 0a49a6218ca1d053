"""Kill a server or its engine at random moments and see that nobody and nothing is left.

    python core/tests/serving/engine/kills.py [--kills 100] [--seed 0]

A host process opens an engine on the null platform and keeps asking it. After a random time one of the two is killed
with SIGKILL: with the host the engine must be gone, with the engine the host must have told its requests, within
`LIMIT_S`; and no folder, no shared memory and no process may be left at the end.
"""

import argparse
import asyncio
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 2.0
LATEST_S = (0.8, 1.2, 2.5)
"""Kills come up to one of these after the start: most meet an interpreter, the handshake or loading, some an answer."""

MODEL = Path(__file__).resolve().parents[4] / "examples/embedded_model/checkpoint"


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill: who, when, in which phase the host was by its own word, and how long until the other had reacted."""

    victim: str
    after_s: float
    phase: str
    reaction_s: float
    left: tuple[str, ...]


async def serve() -> None:
    """Open an engine and ask it without end, saying on standard output how it goes."""
    from zif import SamplingParams
    from zif.serving.answers import EnginePrompt, EngineUnavailableError
    from zif.serving.engine.client import ProcessEngine
    from zif.serving.engine.limits import EngineLimits, ProcessOptions
    from zif.settings import EngineSettings

    settings = EngineSettings(model=str(MODEL), platform="null", max_model_len=256, kv_bytes=1 << 22)
    options = ProcessOptions(limits=EngineLimits(report_s=0.1))
    async with ProcessEngine(settings, options, lambda phase, *_: print(phase, flush=True)) as engine:
        for count in range(10**9):
            try:
                await engine.wait_ready()
            except EngineUnavailableError:
                print("down", flush=True)
                return
            print("ready", flush=True)
            with contextlib.suppress(EngineUnavailableError):
                while True:
                    stream = engine.generate(EnginePrompt([5 + count % 9]), SamplingParams(max_tokens=50))
                    async for _ in stream:
                        pass
                    await asyncio.sleep(0.002)
            print("lost", flush=True)


def kill_once(chance: random.Random) -> Kill:
    """Start a host, kill it or its engine at a random moment, and report what followed."""
    before = _shared_memory()
    with tempfile.TemporaryDirectory(prefix="zk") as folder:
        environment = {**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        host = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        assert host.stdout is not None
        os.set_blocking(host.stdout.fileno(), False)
        after_s, victim = chance.uniform(0.0, chance.choice(LATEST_S)), chance.choice(("host", "engine"))
        time.sleep(after_s)
        phase = (_said(host) or ["interpreter"])[-1]
        engines = _children(host.pid)
        if victim == "engine" and engines:
            reaction_s = _kill_engine(host, engines[0])
            engines = sorted({*engines, *_children(host.pid)})
        host.send_signal(signal.SIGKILL)
        host.wait()
        killed_s = time.monotonic()
        gone = _wait(lambda: not any(_is_alive(pid) for pid in engines))
        if victim == "host" or not engines:
            reaction_s = time.monotonic() - killed_s
        left = [f"process {pid}" for pid in engines if _is_alive(pid)] if not gone else []
        # The engine removes the folder before it is gone; a host that was alone has not made one yet.
        left += [entry.name for entry in Path(folder).iterdir() if entry.name.startswith("zif-")]
        left += sorted(_shared_memory() - before)
        host.stdout.close()
        for pid in engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return Kill(victim, after_s, phase, reaction_s, tuple(left))


def _kill_engine(host: "subprocess.Popen[bytes]", pid: int) -> float:
    """Kill an engine; return in how many seconds the host had noticed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    words: list[str] = []

    def noticed() -> bool:
        words.extend(_said(host))
        return "lost" in words or "down" in words

    _wait(noticed)
    return time.monotonic() - killed_s


def _wait(condition) -> bool:
    deadline = time.monotonic() + 2 * LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _said(host: "subprocess.Popen[bytes]") -> list[str]:
    """Return the lines that the host wrote since the last call."""
    lines = b""
    while select.select([host.stdout], [], [], 0)[0]:
        data = os.read(host.stdout.fileno(), 65536)
        if not data:
            break
        lines += data
    return lines.decode().split("\n")[:-1]


def _children(pid: int) -> list[int]:
    """Return the processes whose parent is `pid`."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _stat(int(name))[1] == pid]


def _is_alive(pid: int) -> bool:
    return _stat(pid)[0] not in ("gone", "Z", "X")


def _stat(pid: int) -> tuple[str, int]:
    """Return state and parent of a process (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return "gone", 0
    return fields[0], int(fields[1])


def _shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "zif" in name}


def main() -> int:
    """Run the kills that were asked for and print what followed. 0 when all went well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return 0
    chance = random.Random(arguments.seed)
    kills = [kill_once(chance) for _ in range(arguments.kills)]
    bad = [kill for kill in kills if kill.left or kill.reaction_s > LIMIT_S]
    for kill in bad:
        print(kill)
    phases = {phase: sum(kill.phase == phase for kill in kills) for phase in sorted({kill.phase for kill in kills})}
    slowest = max(kill.reaction_s for kill in kills)
    print(f"{len(kills) - len(bad)} of {len(kills)} kills left nothing; slowest {slowest:.3f} s; phases {phases}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
