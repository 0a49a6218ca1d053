"""The support matrix: one bundle's tests by subject and outcome, its claims, and several bundles side by side.

`support_table` is what the README shows; it is drawn from bundles and never typed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zif_conformance.bundle.judge import count_outcomes
from zif_conformance.outcomes import Verdict

_WORDS = tuple(verdict.value for verdict in Verdict)
_SIGNS = {"proven": "yes", "unproven": "**unproven**", "outside": "not tested here"}


def matrix_markdown(result: Mapping[str, Any]) -> str:
    """Return `matrix.md`."""
    rows = [[name, *(str(counts[word] or "") for word in _WORDS)] for name, counts in subject_counts(result)]
    claims = [[claim["claim"], _SIGNS[claim["outcome"]], str(len(claim["tests"]))] for claim in result["claims"]]
    parts = [f"# {headline(result)}", _table(["tests", *_WORDS], rows)]
    if claims:
        parts.append("## Claims\n\n" + _table(["claim", "proven", "by tests"], claims))
    if result["errors"]:
        parts.append("## Errors of the run\n\n" + "\n".join(f"- {_flat(error)}" for error in result["errors"]))
    return "\n\n".join(parts) + "\n"


def headline(result: Mapping[str, Any]) -> str:
    """Say in one line what the run found."""
    return f"{result['platform']['name']}: {_finding(result)}{simulation(result)}"


def _finding(result: Mapping[str, Any]) -> str:
    if result["status"] == "partial":
        return "partial run, no verdict"
    if result["profile"] is None:
        return f"levels {', '.join(result['levels'])}, no verdict"
    return f"{result['verdict']} to {result['profile']['name']} {result['profile']['version']}"


def simulation(result: Mapping[str, Any]) -> str:
    """Say that no hardware was there, or nothing."""
    device = result["device"] or {}
    return f" in simulation ({device['architecture']})" if is_simulated(device) else ""


def is_simulated(device: Mapping[str, Any]) -> bool:
    """Say whether a device of a result, or of its summary, was only simulated."""
    return bool(device.get("simulated") or device.get("capabilities", {}).get("simulated"))


def subject_counts(result: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """Return the outcomes of each subject ("L3.attention"), in order."""
    subjects: dict[str, list[Mapping[str, Any]]] = {}
    for test in result["tests"]:
        subjects.setdefault(subject_of(test["id"]), []).append(test)
    return [(name, count_outcomes(tests)) for name, tests in subjects.items()]


def subject_of(test_id: str) -> str:
    """Return level and subject of a test id."""
    return ".".join(test_id.split("[")[0].split(".")[:2])


def support_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return what bundles say about features, dtypes and profiles, one column for each platform."""
    head = ["", *(f"`{result['platform']['name']}`" for result in results)]
    rows = [["profile", *(_profile_cell(result) for result in results)]]
    rows += [["tests passed", *(_passed_cell(result) for result in results)]]
    rows += [["device", *(_flat((result["device"] or {}).get("architecture", "none")) for result in results)]]
    for kind in ("feature", "dtype", "collective"):
        rows += [
            [name, *(_claim_cell(result, f"{kind}:{name}") for result in results)] for name in _names(results, kind)
        ]
    return _table(head, rows)


def _names(results: Iterable[Mapping[str, Any]], kind: str) -> list[str]:
    claims = (claim["claim"] for result in results for claim in result["claims"])
    return sorted({claim.partition(":")[2] for claim in claims if claim.startswith(f"{kind}:")})


def _profile_cell(result: Mapping[str, Any]) -> str:
    if result["profile"] is None or result["verdict"] is None:
        return "no verdict"
    return f"{result['profile']['name']} {result['profile']['version']}: {result['verdict']}{simulation(result)}"


def _passed_cell(result: Mapping[str, Any]) -> str:
    counts = result["counts"]
    return f"{counts['passed']} of {sum(counts.values()) - counts['unsupported']}"


def _claim_cell(result: Mapping[str, Any], claim: str) -> str:
    outcomes = {entry["claim"]: entry["outcome"] for entry in result["claims"]}
    return _SIGNS[outcomes[claim]] if claim in outcomes else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flat(text: str) -> str:
    """Keep a text from breaking out of its line or cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
