"""Which tests hold each clause of the contract, as a page: `python -m zif_conformance.clauses CONTRACT.md PAGE.md`.

The suite's tests name their clauses themselves. What cannot be seen on a platform from outside, promises of core above
all, is held by tests of this project, listed in `data/clauses_elsewhere.toml`. The page is written, never typed.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from zif_conformance.marks import LEVELS
from zif_conformance.outcomes import TestCase
from zif_conformance.supervisor import RunOptions, collect

_CLAUSE = re.compile(r"^- \*\*(\d+\.\d+)\*\* (.*(?:\n  .*)*)", re.MULTILINE)
_MAX_WORDS = 12
_HEAD = """\
# Which tests hold each clause

Written by `make freeze` from the suite and from `clauses_elsewhere.toml`; not to be edited. The clauses are those of
[contract.md](contract.md). A name such as `L3.attention.window_border` is a test of the conformance suite, which runs
on every platform with all its cases; a path is a test of this project, for what no suite can see from outside.
"""


@dataclass(frozen=True, slots=True)
class Clause:
    """One numbered clause, with the words that it begins with."""

    number: str
    beginning: str


def read_clauses(contract: str) -> tuple[Clause, ...]:
    """Return the clauses of the contract's text, in order."""
    return tuple(Clause(found[1], _beginning(found[2])) for found in _CLAUSE.finditer(contract))


def suite_tests(cases: Iterable[TestCase]) -> dict[str, list[str]]:
    """Return the tests of the suite by clause, cases of one test as one."""
    found: dict[str, dict[str, None]] = {}
    for case in cases:
        for clause in case.declaration.clauses:
            found.setdefault(clause, {})[case.test_id.partition("[")[0]] = None
    return {clause: list(names) for clause, names in found.items()}


def other_tests() -> dict[str, tuple[str, ...]]:
    """Return the tests outside the suite by clause, as `path::function`."""
    text = resources.files("zif_conformance").joinpath("data", "clauses_elsewhere.toml").read_text(encoding="utf-8")
    return {clause: tuple(names) for clause, names in tomllib.loads(text).items()}


def clauses_page(
    clauses: Sequence[Clause], suite: Mapping[str, Sequence[str]], others: Mapping[str, Sequence[str]]
) -> str:
    """Return the page as Markdown."""
    parts = [_HEAD]
    for clause in clauses:
        names = [*suite.get(clause.number, ()), *others.get(clause.number, ())]
        listed = "\n".join(f"- `{name}`" for name in names) or "- **none**"
        parts.append(f"**{clause.number}** {clause.beginning}\n\n{listed}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    """Write the page."""
    contract, page = map(Path, arguments)
    clauses = read_clauses(contract.read_text(encoding="utf-8"))
    cases = collect(RunOptions("null", LEVELS))
    page.write_text(clauses_page(clauses, suite_tests(cases), other_tests()), encoding="utf-8")


def _beginning(text: str) -> str:
    words = text.split()
    return " ".join(words[:_MAX_WORDS]) + (" ..." if len(words) > _MAX_WORDS else "")


if __name__ == "__main__":
    main(sys.argv[1:])
