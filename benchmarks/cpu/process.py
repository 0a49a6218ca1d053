"""An engine's process as seen from outside: lines of JSON with a deadline, processor time, memory, and its end.

What it starts belongs to it (`session.py`): vLLM starts two more.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpu.environments import PeerError
from cpu.session import Session
from cpu.workloads import Request

END_S = 20.0
"""How long a process may take to end by itself."""


class EngineProcess:
    """A running engine. Use as a context manager: what is left of the session is killed at the end."""

    def __init__(self, command: Sequence[str], options: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        # Closed by __exit__.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, json.dumps(dict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=Path(__file__).parents[1],
            env=_environment() | dict(variables),
            start_new_session=True,
        )
        self.session = Session(self._process.pid)
        self._received = b""

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_S)
        self.session.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Return what the engine says when it has loaded."""
        return self._receive(timeout_s)

    def ask(self, requests: Sequence[Request], timeout_s: float) -> dict[str, Any]:
        """Have requests answered; return wall time and the times of tokens."""
        entries = [{"prompt": r.prompt, "num_output": r.num_output, "arrival_s": r.arrival_s} for r in requests]
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"requests": entries}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._ended()) from None
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        """Return the next line. Raises `PeerError` when it says failed, does not come in time, or the process ends."""
        stdout = self._process.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    raise PeerError(f"no answer within {timeout_s:g} s")
                piece = os.read(stdout.fileno(), 1 << 20)
                if not piece:
                    raise PeerError(self._ended())
                self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if message["event"] == "failed":
            raise PeerError(message["error"])
        return message

    def _ended(self) -> str:
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            return "the process closed its output and did not end"
        reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._errors.seek(0)
        said = " | ".join(line for line in self._errors.read().splitlines()[-6:] if line.strip())
        return f"the process ended with {reason}: {said[-800:]}"


def _environment() -> dict[str, str]:
    """Return this process's environment, in which Python keeps what it compiles, as it did of installed packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
