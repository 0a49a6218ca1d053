"""Runs one level against one mutant after the other in one process: `python -m zif_conformance.mutants.trial`.

A pytest session collects the level once. Its loop applies a mutant, runs the test that is known to kill it, then all
others, stops at the first failure, and takes the mutant back. What happens is said as JSON lines on a descriptor.
Started by `zif_conformance.mutants.selftest`.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from zif_conformance.child import watch_parent
from zif_conformance.mutants.bank import Subject, Variant, all_mutants, all_variants, by_name
from zif_conformance.mutants.patching import applied

SUITE = Path(__file__).parents[1] / "suite"
_DETAIL = 300


class TrialLoop:
    """The loop of one session. `order` is what `zif_conformance.mutants.selftest.Order` says, as JSON."""

    def __init__(self, order: dict[str, Any], descriptor: int) -> None:
        self._order = order
        self._descriptor = descriptor
        self._failures: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try every subject of the order."""
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} files could not be collected")
        known = by_name(all_mutants(), all_variants())
        excluded, only = self._order["excluded"], self._order.get("only", ())
        items = [item for item in session.items if item.nodeid not in excluded]
        items = [item for item in items if item.nodeid in only] if only else items
        for name in self._order["subjects"]:
            self._say({"event": "started", "name": name})
            with self._changed(known.get(name)):
                self._try(name, self._sorted(name, items), stop=not isinstance(known.get(name), Variant | None))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember a failure of setup, call or teardown."""
        if report.failed:
            self._failures.append(report.nodeid)
            self._detail = report.longreprtext.strip().splitlines()[-1][:_DETAIL] if report.longreprtext else ""

    def _changed(self, subject: Subject | None) -> contextlib.AbstractContextManager[None]:
        """Return the change to make: none for the platform as it is, and where its copy has the fault already."""
        if subject is None or self._order["fresh"]:
            return contextlib.nullcontext()
        return applied(subject.edits)

    def _sorted(self, name: str, items: Sequence[pytest.Item]) -> list[pytest.Item]:
        killer = self._order["killers"].get(name)
        first = [item for item in items if item.nodeid == killer]
        return first if first and self._order["quick"] else [*first, *(item for item in items if item not in first)]

    def _try(self, name: str, items: Sequence[pytest.Item], stop: bool) -> None:
        count, failed, detail = 0, [], ""
        for item, following in zip(items, [*items[1:], None], strict=True):
            self._failures, self._detail = [], ""
            self._say({"event": "runs", "name": name, "test": item.nodeid})
            item.user_properties.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            count += 1
            if self._failures:
                failed.append(item.nodeid)
                detail = detail or self._detail
                if stop:
                    # What tests share is closed with the fault still in place: the next mutant opens its own.
                    with contextlib.suppress(Exception):
                        item.session._setupstate.teardown_exact(None)
                    break
        self._say({"event": "tried", "name": name, "failed": failed, "tests": count, "detail": detail})

    def _say(self, event: dict[str, Any]) -> None:
        line = memoryview((json.dumps(event) + "\n").encode())
        while line:
            line = line[os.write(self._descriptor, line) :]


def main(arguments: Sequence[str]) -> int:
    """Run the order in the file that is named last; before it the lifeline and the descriptor for events."""
    lifeline, events, path = arguments
    watch_parent(int(lifeline))
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    options = ["-p", "zif_conformance.plugin", "-p", "no:cacheprovider", "--tb=line", "--zif-platform=reference"]
    loop = TrialLoop(order, int(events))
    return int(pytest.main([*options, "-c", str(SUITE / "pytest.ini"), *_files(order)], plugins=[loop]))


def _files(order: dict[str, Any]) -> list[str]:
    """Return the files of the suite that hold what the order needs: fewer tests to collect."""
    wanted = list(order.get("only", ()))
    if order["quick"] and not wanted and set(order["subjects"]) <= set(order["killers"]):
        wanted = [order["killers"][name] for name in order["subjects"]]
    if wanted:
        return sorted({str(SUITE / test.partition("::")[0]) for test in wanted})
    # A file is of one level, and says so in its name.
    return sorted(str(file) for file in SUITE.glob(f"test_{order['level'].lower()}_*.py"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
