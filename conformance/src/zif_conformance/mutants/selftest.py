"""The self-test of the suite: every mutant must be killed by a test of its level, and every variant must pass it.

The platform as it is goes first: what fails on it kills nobody. Called by `zif_conformance.mutants.command`.
"""

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zif.errors import EngineError
from zif_conformance.mutants.bank import Mutant, Subject, Variant, by_name
from zif_conformance.mutants.patching import edited_copy
from zif_conformance.processes import TalkingProcess

KILLERS = Path(__file__).parents[1] / "data" / "killers.txt"
"""Which test killed which mutant when the list was written; it is tried first."""

BASELINE = "the platform as it is"
_START_S, _SILENCE_S = 180.0, 150.0
_PORTION, _QUICK_PORTION = 12, 24


@dataclass(frozen=True, slots=True)
class Order:
    """What one process tries. `excluded` tests do not count; `only` those named run, where any is.

    `quick` stops after the known killer.
    """

    level: str
    subjects: tuple[str, ...]
    killers: dict[str, str]
    excluded: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    fresh: bool = False
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """How one subject fared: the tests that failed, by pytest's id, and how many ran. `crash`: how it ended."""

    name: str
    failed: tuple[str, ...]
    num_tests: int
    detail: str = ""
    crash: str = ""

    @property
    def noticed(self) -> bool:
        """Say whether the suite saw a difference."""
        return bool(self.failed or self.crash)


@dataclass(slots=True)
class SelfTest:
    """One self-test of these mutants and variants. `listen` hears each trial as it ends."""

    mutants: Sequence[Mutant]
    variants: Sequence[Variant]
    listen: Callable[[Subject | None, Trial], None]
    workers: int = 1
    quick: bool = False
    trials: dict[str, Trial] = field(default_factory=dict)
    broken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _faults: list[BaseException] = field(default_factory=list)

    @property
    def survivors(self) -> list[Mutant]:
        """Return the mutants that no test has killed."""
        return [mutant for mutant in self.mutants if not self.trials[mutant.name].noticed]

    @property
    def false_alarms(self) -> list[Variant]:
        """Return the variants that some test has failed."""
        return [variant for variant in self.variants if self.trials[variant.name].noticed]

    def run(self) -> None:
        """Try the platform as it is, then all subjects. Raises what a worker raised."""
        levels = sorted({mutant.level for mutant in self.mutants} | {variant.level for variant in self.variants})
        self._work([self._baseline(level) for level in levels])
        self._work(list(self._orders()))

    def _baseline(self, level: str) -> Order:
        killers = read_killers()
        known = [killers.get(mutant.name) for mutant in self.mutants if mutant.level == level]
        # A mutant without a known killer meets every test of the level, so all of them must be known to pass.
        only = {killer for killer in known if killer} if self.quick and all(known) else set()
        return Order(level, (f"{BASELINE}, {level}",), {}, only=tuple(sorted(only)))

    def _orders(self) -> Iterator[Order]:
        """Cut the subjects into portions of one process, the longest first."""
        killers = read_killers()
        for variant in self.variants:
            yield self._order(variant.level, (variant.name,), {}, fresh=variant.fresh)
        for mutant in self.mutants:
            if mutant.fresh:
                yield self._order(mutant.level, (mutant.name,), killers, fresh=True)
        portion = _QUICK_PORTION if self.quick else _PORTION
        for level in sorted({mutant.level for mutant in self.mutants}):
            names = [mutant.name for mutant in self.mutants if mutant.level == level and not mutant.fresh]
            for first in range(0, len(names), portion):
                yield self._order(level, tuple(names[first : first + portion]), killers)

    def _order(self, level: str, names: tuple[str, ...], killers: dict[str, str], fresh: bool = False) -> Order:
        chosen = {name: killers[name] for name in names if name in killers}
        return Order(level, names, chosen, self.broken.get(level, ()), fresh=fresh, quick=self.quick)

    def _work(self, orders: Iterable[Order]) -> None:
        waiting: queue.SimpleQueue[Order] = queue.SimpleQueue()
        for order in orders:
            waiting.put(order)
        threads = [threading.Thread(target=self._take, args=(waiting,), daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
        if self._faults:
            raise self._faults[0]

    def _take(self, waiting: "queue.SimpleQueue[Order]") -> None:
        try:
            while not self._faults:
                self._follow(waiting.get_nowait())
        except queue.Empty:
            return
        except BaseException as error:
            self._faults.append(error)

    def _follow(self, order: Order) -> None:
        """Try the subjects of one order, in one process after another until each has a trial."""
        left = order.subjects
        while left:
            with tempfile.TemporaryDirectory(prefix="zif-mutants-") as folder:
                asked = Order(**{**asdict(order), "subjects": left})
                for trial in _trials(asked, self._edits_of(order), Path(folder)):
                    self._take_in(order, trial)
                    left = tuple(name for name in left if name != trial.name)

    def _edits_of(self, order: Order) -> Subject | None:
        return by_name(self.mutants, self.variants)[order.subjects[0]] if order.fresh else None

    def _take_in(self, order: Order, trial: Trial) -> None:
        known = by_name(self.mutants, self.variants)
        self.trials[trial.name] = trial
        if trial.name not in known:
            if trial.crash:
                raise EngineError(f"{trial.name}: {trial.crash} in {trial.failed!r}:\n{trial.detail}")
            self.broken[order.level] = trial.failed
        self.listen(known.get(trial.name), trial)


def read_killers() -> dict[str, str]:
    """Return pytest's id of the test that is known to kill each mutant."""
    if not KILLERS.exists():
        return {}
    lines = KILLERS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if line and not line.startswith("#"))


def killers_text(trials: Iterable[Trial], known: dict[str, str]) -> str:
    """Return the list of killers as its file holds it: those of the trials, and `known` ones of other mutants."""
    killers = known | {trial.name: trial.failed[0] for trial in trials if trial.failed}
    lines = [f"{name}\t{killer}" for name, killer in sorted(killers.items())]
    head = "# Which test killed which mutant: zif conform self-test --freeze writes this file.\n"
    return head + "".join(f"{line}\n" for line in lines)


def _trials(order: Order, fresh: Subject | None, folder: Path) -> Iterator[Trial]:
    """Run one process over the order; where it dies or hangs, what it was trying has crashed it.

    Raises `EngineError` when it ends before it tried anything, and no fault of the package itself can be the cause.
    """
    path = folder / "order.json"
    path.write_text(json.dumps(asdict(order)), encoding="utf-8")
    environ = dict(os.environ)
    if fresh is not None:
        environ["PYTHONPATH"] = str(edited_copy(fresh.edits, folder))
    process = TalkingProcess("zif_conformance.mutants.trial", ["{lifeline}", "{events}", str(path)], environ)
    trying, test, silence = "", "", _START_S
    begun = False
    try:
        while (event := process.read(time.monotonic() + silence)) is not None:
            silence, begun, trying = _SILENCE_S, True, event["name"]
            test = event.get("test", "")
            if event["event"] == "tried":
                trying = ""
                yield _trial_of(event)
    finally:
        ended = process.finish() if process.at_end else process.kill("hung and was killed")
    if not begun and fresh is None:
        raise EngineError(f"no test of {order.level} could be run: {ended.how}\n{ended.log_tail}")
    if trying or not begun:
        yield Trial(trying or order.subjects[0], (test,) if test else (), 0, ended.log_tail[-1000:], ended.how)


def _trial_of(event: dict[str, Any]) -> Trial:
    return Trial(event["name"], tuple(event["failed"]), event["tests"], event["detail"])
