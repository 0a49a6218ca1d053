"""The six words for what became of a test, and the record of one test. Nothing here runs or judges a profile.

Written by the supervisor and the pytest plugin, read by everything in `zif_conformance.bundle`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from zif_conformance.marks import Declaration, Safety


class Verdict(StrEnum):
    """What became of one test. There is no seventh word."""

    PASSED = "passed"
    UNSUPPORTED = "unsupported"
    WAIVED = "waived"
    FAILED = "failed"
    CRASHED = "crashed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Measurement:
    """How near a test came to its gate: `error` against `limit`, in the gate's own measure."""

    gate: str
    error: float
    limit: float
    what: str = ""

    @property
    def headroom(self) -> float:
        """Return limit / error, infinite for an exact result."""
        return float("inf") if self.error == 0 else self.limit / self.error


@dataclass(frozen=True, slots=True)
class TestCase:
    """One test as collection found it. `test_id` is stable ("L3.attention.window_border[float32]")."""

    __test__ = False

    test_id: str
    node_id: str
    declaration: Declaration
    needs_device: bool


@dataclass(frozen=True, slots=True)
class TestOutcome:
    """One test as the run left it. `missing` are the claims without which it does not run, `proven` those it used."""

    __test__ = False

    test_id: str
    declaration: Declaration
    verdict: Verdict
    detail: str = ""
    duration_s: float = 0.0
    missing: tuple[str, ...] = ()
    proven: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = field(default=())


def reason_line(detail: str) -> str:
    """Return the line of a test's detail that says most: pytest's first line of an error, else the last line."""
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:] or [""])[0]


def case_from_json(data: dict[str, Any]) -> TestCase:
    """Rebuild a case from `case_json`."""
    return TestCase(data["test_id"], data["node_id"], declaration_from_json(data["declaration"]), data["needs_device"])


def case_json(case: TestCase) -> dict[str, Any]:
    """Return the case as JSON holds it."""
    return {
        "test_id": case.test_id,
        "node_id": case.node_id,
        "declaration": case.declaration.as_json(),
        "needs_device": case.needs_device,
    }


def declaration_from_json(data: dict[str, Any]) -> Declaration:
    """Rebuild a declaration from `Declaration.as_json`."""
    lists = {"clauses": tuple(data["clauses"]), "claims": tuple(data["claims"]), "safety": Safety(data["safety"])}
    return Declaration(**{**data, **lists})


def outcome_json(outcome: TestOutcome) -> dict[str, Any]:
    """Return the outcome as `result.json` holds it."""
    return {
        "id": outcome.test_id,
        **outcome.declaration.as_json(),
        "outcome": outcome.verdict.value,
        "detail": outcome.detail,
        "duration_s": round(outcome.duration_s, 4),
        "missing": list(outcome.missing),
        "proven": list(outcome.proven),
        "measurements": [
            {"gate": m.gate, "what": m.what, "error": m.error, "limit": m.limit} for m in outcome.measurements
        ],
    }
