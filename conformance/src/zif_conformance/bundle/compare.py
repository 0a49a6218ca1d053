"""What changed from one bundle to another: outcomes, claims, and head-room that shrank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zif_conformance.outcomes import Verdict

_SHRUNK = 2.0
"""Head-room that fell by less than this factor is not worth a line."""

_ORDER = (Verdict.PASSED, Verdict.WAIVED, Verdict.UNSUPPORTED, Verdict.NOT_RUN, Verdict.FAILED, Verdict.CRASHED)
_RANK = {verdict.value: rank for rank, verdict in enumerate(_ORDER)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Lines for people, by kind. `regressions` are what makes the comparison fail."""

    regressions: tuple[str, ...]
    improvements: tuple[str, ...]
    other: tuple[str, ...]


def compare_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Compare two results, of any platforms."""
    old, new = _by_id(before), _by_id(after)
    changed = [(test_id, old[test_id]["outcome"], new[test_id]["outcome"]) for test_id in new if test_id in old]
    worse = [f"{i}: {was} -> {now}" for i, was, now in changed if _RANK[now] > _RANK[was]]
    better = [f"{i}: {was} -> {now}" for i, was, now in changed if _RANK[now] < _RANK[was]]
    gone = [f"{i}: {old[i]['outcome']} -> no longer in the result" for i in old if i not in new]
    fresh = [f"{i}: new, {new[i]['outcome']}" for i in new if i not in old]
    lost = [f"claim {claim}: proven -> {now}" for claim, now in _lost_claims(before, after)]
    return Comparison((*worse, *gone, *lost), tuple(better), (*fresh, *_shrunk(old, new)))


def _by_id(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {test["id"]: test for test in result["tests"]}


def _lost_claims(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    now = {claim["claim"]: claim["outcome"] for claim in after["claims"]}
    for claim in before["claims"]:
        if claim["outcome"] == "proven" and now.get(claim["claim"]) != "proven":
            yield claim["claim"], now.get(claim["claim"], "not claimed")


def _shrunk(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for test_id in new:
        was, now = (_nearest(tests[test_id]["measurements"]) if test_id in tests else None for tests in (old, new))
        if was is not None and now is not None and now * _SHRUNK < was:
            yield f"{test_id}: head-room fell from {was:.3g}x to {now:.3g}x"


def _nearest(measurements: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the smallest head-room of a test, None when all of it is exact or nothing was measured."""
    ratios = [m["limit"] / m["error"] for m in measurements if m["error"] > 0]
    return min(ratios, default=None)
