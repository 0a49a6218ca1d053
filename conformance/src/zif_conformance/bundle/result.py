"""Builds `result.json` from a run, and seals it: one digest over everything else in it.

The digest shows that a file was changed after the run; it is no signature and names nobody.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from zif_conformance.bundle import judge
from zif_conformance.outcomes import outcome_json
from zif_conformance.profiles import Profile
from zif_conformance.supervisor import Run
from zif_conformance.waivers import Waiver, apply_waivers, waiver_from_json

SCHEMA_ID = "zif-conformance-result/1"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a run besides its tests. `partial` says why it is not complete, or nothing when it is."""

    platform: str
    levels: tuple[str, ...]
    profile: Profile | None
    started: datetime.datetime
    finished: datetime.datetime
    partial: str = ""


def build_result(run: Run, facts: RunFacts) -> dict[str, Any]:
    """Return the result, unsealed. The waivers in the description are applied."""
    description = run.description
    device = description.get("device")
    waivers = tuple(waiver_from_json(entry) for entry in description.get("waivers", ()))
    waived = apply_waivers(run.ordered(), waivers, [case.test_id for case in run.cases], facts.finished.date())
    required = frozenset(facts.profile.must_pass if facts.profile else ())
    tests = [{**outcome_json(o), "must_pass": o.test_id in required} for o in waived.outcomes]
    declared = device["capabilities"] if device else None
    claims = judge.judge_claims(declared, tests, facts.levels)
    result: dict[str, Any] = {
        "schema": SCHEMA_ID,
        "suite_version": metadata.version("zif-conformance"),
        "platform": {"name": facts.platform, **description.get("platform", {})},
        "device": device,
        "profile": _profile_json(facts.profile),
        "levels": list(facts.levels),
        "status": "partial" if facts.partial else "complete",
        "partial_reason": facts.partial,
        "started": facts.started.isoformat(timespec="seconds"),
        "finished": facts.finished.isoformat(timespec="seconds"),
        "duration_s": round((facts.finished - facts.started).total_seconds(), 3),
        "tests": tests,
        "counts": judge.count_outcomes(tests),
        "claims": claims,
        "waivers": list(description.get("waivers", ())),
        "errors": _errors(run, facts, waived.errors, tests, claims),
    }
    must_pass = facts.profile.must_pass if facts.profile else ()
    return {**result, "verdict": judge.verdict_of(result, must_pass), "score": judge.score_of(result, must_pass)}


def waivers_of(result: Mapping[str, Any]) -> tuple[Waiver, ...]:
    """Return the waivers that a result was made with."""
    return tuple(waiver_from_json(entry) for entry in result["waivers"])


def digest_of(result: Mapping[str, Any]) -> str:
    """Hash everything in a result but the digest itself, spelled in one way."""
    plain = {name: value for name, value in result.items() if name != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _errors(
    run: Run,
    facts: RunFacts,
    waiver_errors: Sequence[str],
    tests: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Say what is wrong with the run as a whole, outcomes of single tests aside."""
    if facts.partial:
        return []
    description = run.description
    found = [description[name] for name in ("error", "waiver_error") if name in description]
    declared = description["device"]["capabilities"] if "device" in description else None
    must_pass = facts.profile.must_pass if facts.profile else ()
    return [
        *found,
        *waiver_errors,
        *judge.profile_errors(facts.profile, declared),
        *judge.missing_tests(must_pass, tests),
        *judge.false_excuses(declared, tests),
        *judge.claim_errors(claims),
    ]


def _profile_json(profile: Profile | None) -> dict[str, str] | None:
    return None if profile is None else {"name": profile.name, "version": profile.version}
