"""Child processes that talk in JSON lines, may die at any byte, and are ended with everything they started.

Used by the supervisor. Knows pipes, deadlines and signals; knows no test.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ABORT_WAIT_S = 2.0
_EXIT_WAIT_S = 20.0
_TAIL_BYTES = 16_000
_SHOWN = 6000
_STACKS = "Fatal Python error"
_DROPPED_VARIABLES = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: by itself with a code or signal, or killed."""

    how: str
    log_tail: str
    clean: bool


class TalkingProcess:
    """A Python module run in a session of its own. `{events}` and `{lifeline}` in arguments become descriptors."""

    def __init__(self, module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        read_end, write_end = os.pipe()
        lifeline, self._lifeline = os.pipe()
        self._events, self._buffer = read_end, b""
        self.at_end = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _closed
        named = {"{events}": str(write_end), "{lifeline}": str(lifeline)}
        command = [sys.executable, "-m", module, *(named.get(argument, argument) for argument in arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end, lifeline),
            env=clean_environment(environ),
            start_new_session=True,
        )
        os.close(write_end)
        os.close(lifeline)

    def read(self, deadline: float) -> dict[str, Any] | None:
        """Return the next line, or None when it says no more (`at_end`) or at `deadline` (of `time.monotonic`)."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._events], [], [], max(left, 0.0))
            if not ready:
                return None
            chunk = os.read(self._events, 1 << 16)
            if not chunk:
                self.at_end = True
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def finish(self) -> Ended:
        """Wait for a process that has said all; kill one that stays."""
        try:
            code = self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return self.kill("stayed after its last test and was killed")
        self._kill_group()
        return self._closed(_how(code), clean=code in (0, 1))

    def kill(self, why: str) -> Ended:
        """End the process and what it started; a living interpreter writes its stacks to the log first."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ABORT_WAIT_S)
        self._kill_group()
        self._process.wait()
        return self._closed(why, clean=False)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _closed(self, how: str, clean: bool) -> Ended:
        for descriptor in (self._events, self._lifeline):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        text = self._log.read().decode(errors="replace")
        self._log.close()
        return Ended(how, _telling_part(text), clean)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which the caller's pytest settings and other pytest plugins have no say.

    Idle OpenMP threads sleep soon unless the caller says otherwise: spinning beside busy neighbours turns seconds into
    minutes, and tests would miss their deadlines for it (libgomp manual, GOMP_SPINCOUNT).
    """
    kept = {name: value for name, value in environ.items() if name not in _DROPPED_VARIABLES}
    if "OMP_WAIT_POLICY" not in kept:
        kept.setdefault("GOMP_SPINCOUNT", "1000")
    return {**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONFAULTHANDLER": "1", "PYTHONHASHSEED": "0"}


def _telling_part(log: str) -> str:
    """Return the stacks of a process that was aborted, from the innermost call on, or else the last lines."""
    return log[log.rindex(_STACKS) :][:_SHOWN] if _STACKS in log else log[-_SHOWN:]


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
