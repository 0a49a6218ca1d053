"""One run from beginning to end: progress with the time left, a bundle that is there at any moment, the result.

Called by `zif_conformance.command`; `zif_conformance.supervisor` runs the tests.
"""

import datetime
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from zif_conformance.bundle.result import RunFacts, build_result
from zif_conformance.bundle.writing import claim_folder, write_bundle
from zif_conformance.outcomes import TestOutcome, Verdict, reason_line
from zif_conformance.profiles import Profile
from zif_conformance.supervisor import Run, RunOptions, Supervisor

_SAVE_EVERY_S = 15.0
_SHOW_EVERY_S = 10.0
_SETTLED_S, _SETTLED_TESTS = 3.0, 5
_SHOWN = (Verdict.FAILED, Verdict.CRASHED)


@dataclass(slots=True)
class Progress:
    """How far a run is: a line that renews itself on a terminal, a line now and then elsewhere, failures at once."""

    total: int
    begin_s: float
    done: int = 0
    bad: int = 0
    shown_s: float = 0.0

    def __call__(self, outcome: TestOutcome) -> None:
        """Hear of an outcome."""
        self.done += 1
        now, live = time.monotonic(), sys.stderr.isatty()
        if outcome.verdict in _SHOWN:
            self.bad += 1
            print(
                f"{_clear(live)}{outcome.verdict.value}: {outcome.test_id}: {reason_line(outcome.detail)[:200]}",
                file=sys.stderr,
                flush=True,
            )
        if live or now - self.shown_s >= _SHOW_EVERY_S:
            self.shown_s = now
            print(f"{_clear(live)}{self.line(now)}", end="" if live else "\n", file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """Return what is done and how long the rest takes if it goes on like this."""
        bad = f", {self.bad} failed" if self.bad else ""
        return f"{self.done} of {self.total} tests{bad}, {self._left(now)}"

    def _left(self, now: float) -> str:
        """Say how long the rest takes. The first seconds are start-up and tell nothing."""
        passed = now - self.begin_s
        if passed < _SETTLED_S or self.done < _SETTLED_TESTS:
            return "time left not known yet"
        seconds = round(passed / self.done * (self.total - self.done))
        return f"about {seconds // 60} min {seconds % 60} s left" if seconds >= 60 else f"about {seconds} s left"

    def end(self) -> None:
        """Leave the line that renews itself."""
        print(_clear(sys.stderr.isatty()), end="", file=sys.stderr, flush=True)


class Conductor:
    """Conducts one run. `bundle` None writes nothing."""

    def __init__(self, options: RunOptions, profile: Profile | None, bundle: Path | None) -> None:
        self._options = options
        self._profile = profile
        self._bundle = bundle
        self._started = datetime.datetime.now(datetime.UTC)
        self._saved_s = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run and return the result. KeyboardInterrupt is raised after a partial bundle is written."""
        with _terminated_as_interrupt():
            return self._run()

    def _run(self) -> dict[str, Any]:
        if self._bundle is not None:
            claim_folder(self._bundle)
        supervisor = Supervisor(self._options, self._hear)
        self._standing = supervisor.prepare()
        self._progress = Progress(len(self._standing.selected), time.monotonic())
        self._save("the run is under way or was killed")
        try:
            supervisor.execute(self._standing)
        except BaseException as error:
            self._save(f"the run was ended by {type(error).__name__}")
            raise
        finally:
            self._progress.end()
        return self._save("")

    def _hear(self, outcome: TestOutcome) -> None:
        self._progress(outcome)
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self._save("the run is under way or was killed")

    def _save(self, partial: str) -> dict[str, Any]:
        """Build the result as it stands, and write it."""
        self._saved_s = time.monotonic()
        finished = datetime.datetime.now(datetime.UTC)
        facts = RunFacts(self._options.platform, self._options.levels, self._profile, self._started, finished, partial)
        result = build_result(self._standing, facts)
        if self._bundle is None:
            return result
        return write_bundle(self._bundle, result, self._standing.description)

    _standing: Run
    _progress: Progress


@contextmanager
def _terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _clear(live: bool) -> str:
    return "\r\x1b[K" if live else ""
