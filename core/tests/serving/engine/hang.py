"""Hang the device under a real `zif serve` and see that it is told and mended; then see that what is slow is not.

    python core/tests/serving/engine/hang.py [--kill-after 60]

First a step of the device never returns: /readyz must turn 503 within 10 s of the request, with the server's own
defaults, /livez must stay 200 and the metrics must say it. After `--kill-after` seconds more the engine must be killed,
its request answered with an error at once, and a new engine must take requests. Then, on a server that calls an
engine hung after 2 s and kills it a second later, a load of 8 s and a compilation of 8 s in the first step, and after
them a form of structured output: none may look like a hang.
"""

import argparse
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from faulty_device import COMPILE, COMPILE_VARIABLE, HANG, LOAD_VARIABLE, NAME, install

MODEL = Path(__file__).resolve().parents[4] / "examples/embedded_model/checkpoint"
READY_LIMIT_S = 10.0
AT_ONCE_S = 3.0
PATIENCE_S = 60.0
SLOW_S = 8.0
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens."""

    port: int

    def ask(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Make one request on a connection of its own and return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2 * PATIENCE_S)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, content, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def complete(self, token_id: int, **given: object) -> int:
        """Have a prompt of one token answered and return the status."""
        return self.ask("/v1/completions", {"prompt": [token_id], "max_tokens": 4, **given})[0]

    def metric(self, name: str) -> float:
        """Return the value of a metric of zif without labels of its own."""
        lines = self.ask("/metrics")[1].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"zif:{name}{{")).rpartition(" ")[2])

    def wait_ready(self) -> float:
        """Wait until requests are taken; return after how many seconds. Raises `TimeoutError`."""
        return wait(lambda: self.ask("/readyz")[0] == 200)


@dataclass
class Background:
    """A call in a thread, when it ended, and what it gave."""

    call: Callable[[], object]
    begun_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    result: object = None

    def __post_init__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.result = self.call()
        self.ended_s = time.monotonic()


class Verdict:
    """What was seen, line by line, and whether all of it was right."""

    def __init__(self) -> None:
        self.holds = True

    def note(self, text: str, *, right: bool) -> None:
        """Print one finding."""
        self.holds = self.holds and right
        print(f"{'ok    ' if right else 'WRONG '} {text}", flush=True)


def wait(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> float:
    """Wait until a condition holds; return after how many seconds. Raises `TimeoutError`."""
    begin_s = time.monotonic()
    while not condition():
        if time.monotonic() > begin_s + patience_s:
            raise TimeoutError(f"waited {patience_s:g} s in vain")
        time.sleep(LOOK_S)
    return time.monotonic() - begin_s


@contextlib.contextmanager
def serving(environment: dict[str, str], *options: str) -> Iterator[Server]:
    """Start `zif serve`, not waiting for its engine, and end it."""
    port = free_port()
    command = [sys.executable, "-m", "zif.cli", "serve", str(MODEL), "--platform", NAME]
    command += ["--port", str(port), "--no-log-requests"]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen([*command, *options], stderr=said, env=environment) as process,
    ):
        try:
            server = Server(port)
            wait(lambda: process.poll() is not None or listens(server))
            yield server
        except (OSError, TimeoutError):
            said.seek(0)
            print(said.read()[-2000:])
            raise
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def free_port() -> int:
    """Return a port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(server: Server) -> bool:
    """Say whether the server's socket is open."""
    try:
        return server.ask("/livez")[0] == 200
    except OSError:
        return False


def prove_hang(environment: dict[str, str], verdict: Verdict, kill_after_s: int) -> None:
    """Hang a step, see it told, and see the engine replaced."""
    with serving(environment, "--kill-hung-after-s", str(kill_after_s)) as server:
        server.wait_ready()
        verdict.note("a request is answered before the hang", right=server.complete(5) == 200)
        hung = Background(lambda: server.complete(HANG))
        told_s = wait(lambda: server.ask("/readyz")[0] == 503)
        reason = json.loads(server.ask("/readyz")[1]).get("reason")
        verdict.note(f"/readyz is 503 after {told_s:.1f} s: {reason}", right=told_s <= READY_LIMIT_S)
        verdict.note("/livez is 200 meanwhile", right=server.ask("/livez")[0] == 200)
        verdict.note("zif:engine_hung is 1", right=server.metric("engine_hung") == 1)
        alive: list[bool] = []

        def has_ended() -> bool:
            alive.append(server.ask("/livez")[0] == 200)
            return hung.ended_s is not None

        ended_s = told_s + wait(has_ended, kill_after_s + PATIENCE_S)
        verdict.note(f"the hung request ends with {hung.result} after {ended_s:.1f} s", right=hung.result == 503)
        too_late_s = told_s + kill_after_s + AT_ONCE_S
        verdict.note(
            f"its engine was given {kill_after_s} s more", right=told_s + kill_after_s <= ended_s <= too_late_s
        )
        back_s = server.wait_ready()
        verdict.note(f"a new engine is ready {back_s:.1f} s later", right=server.complete(5) == 200)
        wait(lambda: server.metric("engine_restarts_total") == 1)
        verdict.note("one restart is counted, and nothing is hung", right=server.metric("engine_hung") == 0)
        verdict.note(f"/livez was 200 in {sum(alive)} of {len(alive)} looks", right=all(alive))


def prove_patience(environment: dict[str, str], verdict: Verdict) -> None:
    """Load and compile for longer than a hang would be given, and see that nothing takes it for one."""
    slow = {**environment, LOAD_VARIABLE: str(SLOW_S), COMPILE_VARIABLE: str(SLOW_S)}
    with serving(slow, "--hang-after-s", "2", "--kill-hung-after-s", "1") as server:
        hung: list[float] = []

        def is_ready() -> bool:
            hung.append(server.metric("engine_hung"))
            return server.ask("/readyz")[0] == 200

        load_s = wait(is_ready)
        verdict.note(f"a load of {load_s:.1f} s is waited for", right=load_s >= SLOW_S - 3 and not any(hung))
        compiled = Background(lambda: server.complete(COMPILE))
        ready: list[bool] = []

        def has_compiled() -> bool:
            ready.append(is_ready())
            return compiled.ended_s is not None

        step_s = wait(has_compiled)
        right = compiled.result == 200 and step_s >= SLOW_S - 1 and all(ready) and not any(hung)
        verdict.note(f"a first step that compiles for {step_s:.1f} s is not hung: {compiled.result}", right=right)
        form = {"type": "object", "properties": {f"name{n}": {"type": "string"} for n in range(400)}}
        structured = {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": form}}}
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **structured}
        status, answer = server.ask("/v1/chat/completions", chat)
        verdict.note(f"a form is compiled and followed: {status} {answer[:120]!r}", right=status == 200 and is_ready())
        verdict.note("no engine was started again", right=server.metric("engine_restarts_total") == 0)


def main() -> int:
    """Run both proofs. 0 when all of it was right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill-after", type=int, default=60, help="seconds that the hung engine is given")
    options = parser.parse_args()
    verdict = Verdict()
    with tempfile.TemporaryDirectory(prefix="zh") as folder:
        environment = install(Path(folder))
        prove_hang(environment, verdict, options.kill_after)
        prove_patience(environment, verdict)
    print("all holds" if verdict.holds else "FAILED")
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
