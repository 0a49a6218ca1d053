"""Follows one pytest session and says what happens, test by test, as JSON lines and in memory.

Registered by `zif_conformance.plugin`; the lines go to the supervisor. Which of the six words an end deserves is
decided here for the words that a living process can say; crashed, waived and not run are said by others.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from zif_conformance.marks import declaration_of
from zif_conformance.outcomes import TestCase, Verdict, case_json
from zif_conformance.proof import MEASURED, MISSING, PROVEN

_MAX_DETAIL = 4000
_MAX_MEASUREMENTS = 64


@dataclass(slots=True)
class _Running:
    """The test under way: its worst end so far, and the time it took."""

    test_id: str
    verdict: Verdict = Verdict.PASSED
    detail: str = ""
    duration_s: float = 0.0
    properties: list[tuple[str, Any]] = field(default_factory=list)


class Recorder:
    """Writes events to a file descriptor, where one is given, and keeps the finished ones."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._running: _Running | None = None
        self._ids: dict[str, str] = {}
        self.finished: list[dict[str, Any]] = []

    def collected(self, cases: Iterable[TestCase]) -> None:
        """Say what there is."""
        listed = list(cases)
        self._ids = {case.node_id: case.test_id for case in listed}
        self._say({"event": "collected", "cases": [case_json(case) for case in listed]})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say that a test starts."""
        if nodeid in self._ids:
            self._running = _Running(self._ids[nodeid])
            self._say({"event": "started", "id": self._running.test_id})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """Say that the fixtures stand and the test itself begins."""
        if self._running and declaration_of(item):
            self._say({"event": "called", "id": self._running.test_id})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in how setup, call or teardown went."""
        running = self._running
        if running is None or report.nodeid not in self._ids:
            return
        running.duration_s += report.duration
        running.properties = list(report.user_properties)
        if report.failed:
            self._fail(f"{report.when}: {report.longreprtext}")
        elif report.skipped:
            self._skip(report)
        elif hasattr(report, "wasxfail"):
            self._fail("the test passed as an expected failure; suite tests expect nothing but to pass")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Say how a test ended."""
        running, self._running = self._running, None
        if running is None:
            return
        event = {
            "event": "finished",
            "id": running.test_id,
            "outcome": running.verdict.value,
            "detail": running.detail,
            "duration_s": running.duration_s,
            "missing": _values(running, MISSING),
            "proven": _values(running, PROVEN) if running.verdict is Verdict.PASSED else [],
            "measurements": _worst(_values(running, MEASURED)),
        }
        self.finished.append(event)
        self._say(event)

    def _fail(self, detail: str) -> None:
        running = self._running
        if running and running.verdict is not Verdict.FAILED:
            running.verdict, running.detail = Verdict.FAILED, _shortened(detail)

    def _skip(self, report: pytest.TestReport) -> None:
        """Only a claim that is missing excuses a test; any other skip is a failure of the suite."""
        running = self._running
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if running and _values(running, MISSING):
            running.verdict, running.detail = Verdict.UNSUPPORTED, reason
        else:
            self._fail(f"{report.when}: skipped without a missing claim: {reason}")

    def _say(self, event: dict[str, Any]) -> None:
        if self._descriptor is None:
            return
        line = memoryview((json.dumps(event) + "\n").encode())
        while line:
            line = line[os.write(self._descriptor, line) :]


def _values(running: _Running, name: str) -> list[Any]:
    found = [value for key, value in running.properties if key == name]
    return list(dict.fromkeys(found)) if name != MEASURED else found


def _worst(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the measurements nearest to their gate."""
    nearest = sorted(
        measurements, key=lambda m: m["limit"] - m["error"] if m["limit"] == 0 else -m["error"] / m["limit"]
    )
    return nearest[:_MAX_MEASUREMENTS]


def _shortened(text: str) -> str:
    if len(text) <= _MAX_DETAIL:
        return text
    half = _MAX_DETAIL // 2
    return f"{text[:half]}\n... {len(text) - _MAX_DETAIL} characters ...\n{text[-half:]}"
