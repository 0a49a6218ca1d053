"""Re-checks a bundle off line: schema, digest, files, must-pass list, claims and verdict, from the bundle alone.

It shows that a bundle is whole and that its verdict follows from its outcomes. It does not show who made it.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from zif.errors import ConfigError
from zif_conformance.bundle import judge
from zif_conformance.bundle.result import digest_of, waivers_of
from zif_conformance.bundle.writing import DRAWN, RESULT, drawn_files
from zif_conformance.outcomes import Measurement, TestOutcome, Verdict, declaration_from_json
from zif_conformance.profiles import Profile, levels_of, profile
from zif_conformance.waivers import apply_waivers

_DECLARED = ("level", "gate", "clauses", "claims", "negative", "deadline_s", "safety", "isolated")


def read_result(folder: Path) -> dict[str, Any]:
    """Read a bundle's result. Raises `ConfigError` when there is none that can be read."""
    path = folder / RESULT
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}; give the folder that --bundle wrote") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} holds no result; give the folder that --bundle wrote")
    return data


def verify_bundle(folder: Path) -> list[str]:
    """Return everything that is wrong with a bundle; empty when it stands. Raises `ConfigError` like `read_result`."""
    result = read_result(folder)
    if problems := [*_schema_problems(result)]:
        return problems
    if problems := [*_version_problems(result)]:
        return problems
    return [*_partial_problems(result), *_file_problems(folder, result), *_profile_problems(result)]


def result_schema() -> dict[str, Any]:
    """Return the JSON Schema of `result.json`."""
    text = resources.files("zif_conformance").joinpath("data", "result.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _schema_problems(result: Mapping[str, Any]) -> Iterator[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(result_schema())
    for error in validator.iter_errors(result):
        yield f"{RESULT} breaks its schema at {'/'.join(map(str, error.path)) or 'the top'}: {error.message[:300]}"


def _version_problems(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield when another version of the suite made the bundle: it draws and judges in its own way."""
    made, here = result["suite_version"], metadata.version("zif-conformance")
    if made != here:
        yield f"the bundle was made with zif-conformance {made}, this is {here}: verify it with that version"


def _partial_problems(result: Mapping[str, Any]) -> Iterator[str]:
    if result["status"] == "partial":
        yield f"the run is partial ({result['partial_reason']}): it has no score and proves nothing; run it again"


def _file_problems(folder: Path, result: Mapping[str, Any]) -> Iterator[str]:
    if result["digest"] != digest_of(result):
        yield f"{RESULT} was changed after the run: its digest does not fit"
    for name, digest in result["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield f"{name} was changed after the run: its digest does not fit"
    for name, text in drawn_files(result).items():
        if result["files"].get(name) != hashlib.sha256(text.encode()).hexdigest():
            yield f"{name} is not what {RESULT} says"
    if missing := {*DRAWN, "dispatch.json", "environment.json"} - set(result["files"]):
        yield f"{', '.join(sorted(missing))} is not in the list of files"


def _profile_problems(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield where outcomes, claims, errors and verdict do not follow from each other."""
    asked = _profile_of(result)
    if isinstance(asked, str):
        yield asked
        return
    must_pass = asked.must_pass if asked else ()
    declared = result["device"]["capabilities"] if result["device"] else None
    if asked and tuple(result["levels"]) != levels_of(asked.name):
        yield f"levels {result['levels']!r} are not those of profile {asked.name!r}"
    tests: Sequence[Mapping[str, Any]] = result["tests"]
    yield from _list_problems(result, frozenset(must_pass))
    claims = judge.judge_claims(declared, tests, result["levels"])
    if result["claims"] != claims:
        yield "claims do not follow from the tests"
    if result["status"] == "complete":
        for error in _errors_due(result, asked, claims):
            if error not in result["errors"]:
                yield f"an error is left out: {error}"
    if result["verdict"] != judge.verdict_of(result, must_pass) or result["score"] != judge.score_of(result, must_pass):
        yield "verdict or score do not follow from the tests"


def _list_problems(result: Mapping[str, Any], must_pass: frozenset[str]) -> Iterator[str]:
    """Yield where the list of tests does not fit itself or the profile."""
    tests = result["tests"]
    if len({test["id"] for test in tests}) != len(tests):
        yield "a test is listed twice"
    if any(test["must_pass"] != (test["id"] in must_pass) for test in tests):
        yield "what must pass is not what the profile says"
    if result["counts"] != judge.count_outcomes(tests):
        yield "counts do not fit the tests"


def _errors_due(result: Mapping[str, Any], asked: Profile | None, claims: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    tests = result["tests"]
    declared = result["device"]["capabilities"] if result["device"] else None
    yield from judge.profile_errors(asked, declared)
    yield from judge.missing_tests(asked.must_pass if asked else (), tests)
    yield from judge.false_excuses(declared, tests)
    yield from judge.claim_errors(claims)
    yield from _waiver_errors(result)


def _waiver_errors(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield waived outcomes that no waiver of the bundle allows."""
    waivers, today = waivers_of(result), datetime.datetime.fromisoformat(result["finished"]).date()
    outcomes = [_before_waivers(test) for test in result["tests"]]
    applied = {outcome.test_id: outcome for outcome in apply_waivers(outcomes, waivers, _ids(outcomes), today).outcomes}
    for test in result["tests"]:
        if test["outcome"] == Verdict.WAIVED.value and applied[test["id"]].verdict is not Verdict.WAIVED:
            yield f"{test['id']} is waived, and no waiver allows it"


def _before_waivers(test: Mapping[str, Any]) -> TestOutcome:
    declaration = declaration_from_json({name: test[name] for name in _DECLARED})
    verdict = Verdict(test["outcome"])
    failed = Verdict.FAILED if verdict is Verdict.WAIVED else verdict
    measured = tuple(Measurement(m["gate"], m["error"], m["limit"], m["what"]) for m in test["measurements"])
    return TestOutcome(test["id"], declaration, failed, test["detail"], measurements=measured)


def _ids(outcomes: Sequence[TestOutcome]) -> list[str]:
    return [outcome.test_id for outcome in outcomes]


def _profile_of(result: Mapping[str, Any]) -> Profile | str | None:
    """Return the profile as this suite has it, or why it cannot be compared."""
    if result["profile"] is None:
        return None
    name, version = result["profile"]["name"], result["profile"]["version"]
    try:
        known = profile(name)
    except ConfigError as error:
        return str(error)
    if known.version != version:
        return f"the bundle is of {name} {version}, this suite has {name} {known.version}: verify it with that suite"
    return known
