"""What a list of outcomes means: counts, which claims are proven, the verdict on a profile and its score.

Pure functions over the JSON of `result.json`, so that `verify` comes to the same end from the file alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zif_conformance.claims import COMPUTING, Claims, home_levels
from zif_conformance.outcomes import Verdict
from zif_conformance.profiles import Profile

CONFORMANT, NOT_CONFORMANT = "conformant", "not conformant"
_GOOD = (Verdict.PASSED.value, Verdict.UNSUPPORTED.value, Verdict.WAIVED.value)

Tests = Sequence[Mapping[str, Any]]


def count_outcomes(tests: Tests) -> dict[str, int]:
    """Count the six words."""
    return {verdict.value: sum(test["outcome"] == verdict.value for test in tests) for verdict in Verdict}


def judge_claims(declared: Mapping[str, Any] | None, tests: Tests, levels: Iterable[str]) -> list[dict[str, Any]]:
    """Return each claim with what became of it.

    *proven*: a test that exercises it passed. *unproven*: none did. *outside*: only levels that were not asked for
    exercise it.
    """
    if declared is None:
        return []
    run_levels, claims = set(levels), Claims.from_json(declared)
    due = claims.names if claims.computes else {COMPUTING}
    return [_judge_claim(claim, tests, run_levels) for claim in sorted(due)]


def claim_errors(claims: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say which claims fail the run."""
    return [
        "the platform says that it computes nothing, so there is nothing to prove"
        if claim["claim"] == COMPUTING
        else f"claim {claim['claim']}: no test that exercises it passed; a claim is an obligation"
        for claim in claims
        if claim["outcome"] == "unproven"
    ]


def false_excuses(declared: Mapping[str, Any] | None, tests: Tests) -> list[str]:
    """Say which tests are *unsupported* although the platform claims everything that they miss."""
    claims = Claims.from_json(declared) if declared else None
    return [
        f"{test['id']} is unsupported, but the platform claims {', '.join(test['missing']) or 'all that it exercises'}"
        for test in tests
        if test["outcome"] == Verdict.UNSUPPORTED.value
        and (claims is None or not test["missing"] or all(claims.has(name) for name in test["missing"]))
    ]


def profile_errors(profile: Profile | None, declared: Mapping[str, Any] | None) -> list[str]:
    """Say what keeps a platform from a profile that is about one claim: not to make it."""
    if profile is None or not profile.claim or (declared and Claims.from_json(declared).has(profile.claim)):
        return []
    return [f"profile {profile.name} is about {profile.claim}, which the platform does not claim"]


def missing_tests(must_pass: Iterable[str], tests: Tests) -> list[str]:
    """Say which tests of a must-pass list are not in the result."""
    present = {test["id"] for test in tests}
    return [f"must-pass test {test_id} is not in the result" for test_id in must_pass if test_id not in present]


def bad_outcomes(tests: Tests, ids: Iterable[str]) -> list[str]:
    """Return the ids whose outcome keeps a platform from its profile."""
    wanted = set(ids)
    return [test["id"] for test in tests if test["id"] in wanted and test["outcome"] not in _GOOD]


def verdict_of(result: Mapping[str, Any], must_pass: Sequence[str]) -> str | None:
    """Return the verdict on the profile of a complete run, None where there is none to give."""
    if result["status"] != "complete" or result["profile"] is None:
        return None
    clean = not result["errors"] and not bad_outcomes(result["tests"], must_pass)
    return CONFORMANT if clean and not missing_tests(must_pass, result["tests"]) else NOT_CONFORMANT


def score_of(result: Mapping[str, Any], must_pass: Sequence[str]) -> float | None:
    """Return the share of the profile's tests that passed, of those that this platform has to run."""
    if result["status"] != "complete" or result["profile"] is None:
        return None
    outcomes = {test["id"]: test["outcome"] for test in result["tests"]}
    found = [outcomes.get(test_id, Verdict.NOT_RUN.value) for test_id in must_pass]
    applicable = [outcome for outcome in found if outcome != Verdict.UNSUPPORTED.value]
    passed = sum(outcome == Verdict.PASSED.value for outcome in applicable)
    return round(passed / len(applicable), 6) if applicable else 0.0


def _judge_claim(claim: str, tests: Tests, run_levels: set[str]) -> dict[str, Any]:
    homes = home_levels(claim)
    provers = [test["id"] for test in tests if claim in test["proven"] and test["outcome"] == Verdict.PASSED.value]
    if provers:
        outcome = "proven"
    else:
        # Part of a claim's levels proves nothing against it: the test may be in the others.
        outcome = "unproven" if run_levels.issuperset(homes) else "outside"
    return {"claim": claim, "levels": list(homes), "outcome": outcome, "tests": provers}
