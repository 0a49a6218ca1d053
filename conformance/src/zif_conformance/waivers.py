"""Waivers: failures that a vendor owns up to, in a file of its own package, with a reason, a link and an end.

The file is `conformance_waivers.toml` in the plugin's package:

    [[waiver]]
    test = "L2.ops.linear[float16]"
    reason = "plugin bug"
    link = "https://example.org/issues/7"
    expires = 2027-01-31

Applied by `zif_conformance.bundle.result`. A waiver that is stale, expired, out of place or unneeded is an error.
"""

import datetime
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zif.errors import ContractError
from zif_conformance.outcomes import TestOutcome, Verdict

FILE_NAME = "conformance_waivers.toml"
REASONS = ("device limit", "plugin bug", "suite bug", "spec unclear")
MAX_PERCENT = 2
"""The largest share of a run's tests that waivers may take."""

_FIELDS = {"test", "reason", "link", "expires"}


@dataclass(frozen=True, slots=True)
class Waiver:
    """One waiver. It holds up to and including the day `expires`."""

    test: str
    reason: str
    link: str
    expires: datetime.date


@dataclass(frozen=True, slots=True)
class Waived:
    """Outcomes after waivers, and what is wrong with the waivers."""

    outcomes: tuple[TestOutcome, ...]
    errors: tuple[str, ...]


def read_waivers(text: str) -> tuple[Waiver, ...]:
    """Read the file's text. Raises `ContractError` on anything that is not as the module says."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ContractError(f"{FILE_NAME} is no TOML: {error}; correct it or remove it") from error
    entries = data.get("waiver", [])
    if set(data) - {"waiver"} or not isinstance(entries, list):
        raise ContractError(f"{FILE_NAME} has {sorted(data)!r} at the top; it holds [[waiver]] tables only")
    return tuple(_waiver(entry) for entry in entries)


def waiver_json(waiver: Waiver) -> dict[str, str]:
    """Return the waiver as JSON holds it."""
    return {"test": waiver.test, "reason": waiver.reason, "link": waiver.link, "expires": waiver.expires.isoformat()}


def waiver_from_json(data: Mapping[str, Any]) -> Waiver:
    """Rebuild a waiver. Raises `ContractError` like `read_waivers`."""
    try:
        expires = datetime.date.fromisoformat(str(data.get("expires")))
    except ValueError:
        expires = None
    return _waiver({**data, "expires": expires})


def apply_waivers(
    outcomes: Sequence[TestOutcome], waivers: Iterable[Waiver], known_ids: Iterable[str], today: datetime.date
) -> Waived:
    """Turn waived failures into *waived*, and say what is wrong with waivers that do not apply.

    `known_ids` are all test ids of the suite, so that a waiver of a level that was not run is not called stale.
    """
    by_id = {outcome.test_id: outcome for outcome in outcomes}
    known, errors, seen = set(known_ids), [], set()
    for waiver in waivers:
        outcome = by_id.get(waiver.test)
        problem = _problem(waiver, outcome, today) if waiver.test in known else "no test has this id"
        if waiver.test in seen:
            problem = "it is waived twice"
        seen.add(waiver.test)
        if problem:
            errors.append(f"waiver of {waiver.test}: {problem}; correct {FILE_NAME}")
        elif outcome is not None and outcome.verdict is Verdict.FAILED:
            detail = f"{waiver.reason}, until {waiver.expires}: {waiver.link}\n{outcome.detail}"
            by_id[waiver.test] = replace(outcome, verdict=Verdict.WAIVED, detail=detail)
    num_waived = sum(outcome.verdict is Verdict.WAIVED for outcome in by_id.values())
    if num_waived * 100 > MAX_PERCENT * len(outcomes):
        errors.append(f"{num_waived} of {len(outcomes)} tests are waived; at most {MAX_PERCENT} % may be")
    return Waived(tuple(by_id.values()), tuple(errors))


def _problem(waiver: Waiver, outcome: TestOutcome | None, today: datetime.date) -> str:
    if waiver.expires < today:
        return f"it expired on {waiver.expires}"
    if outcome is None or outcome.verdict is Verdict.NOT_RUN:
        return ""
    if not outcome.declaration.waivable:
        return "tests of G0, G1 and memory safety cannot be waived"
    if outcome.verdict is Verdict.CRASHED:
        return "a crash or a hang cannot be waived"
    if outcome.verdict is Verdict.PASSED:
        return "the test passes: remove the waiver"
    if outcome.verdict is Verdict.UNSUPPORTED:
        return "the test does not run on this platform: remove the waiver"
    return ""


def _waiver(entry: Any) -> Waiver:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise ContractError(f"{FILE_NAME}: {entry!r} must have exactly {', '.join(sorted(_FIELDS))}")
    test, reason, link, expires = (entry[name] for name in ("test", "reason", "link", "expires"))
    if reason not in REASONS:
        raise ContractError(f"{FILE_NAME}: reason={reason!r} of {test!r} must be one of: {', '.join(REASONS)}")
    if not isinstance(link, str) or not link.startswith(("https://", "http://")):
        raise ContractError(f"{FILE_NAME}: link={link!r} of {test!r} must be the address of an issue")
    if type(expires) is not datetime.date:
        raise ContractError(f"{FILE_NAME}: expires={expires!r} of {test!r} must be a date such as 2027-01-31")
    return Waiver(str(test), reason, link, expires)
