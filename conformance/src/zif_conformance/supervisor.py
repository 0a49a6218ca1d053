"""Runs the suite in child processes, so that what a platform does to a process ends one test and not the run.

A child runs pytest over some of the tests. When it dies, or a test passes its deadline, that test has *crashed* and a
new child takes the rest. Called by `zif_conformance.command`; what the outcomes mean is judged in `bundle.judge`.
"""

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zif.errors import ConfigError, ContractError
from zif_conformance.outcomes import Measurement, TestCase, TestOutcome, Verdict, case_from_json
from zif_conformance.processes import Ended, TalkingProcess

SUITE = Path(__file__).parent / "suite"
_MAX_OPENING_CRASHES = 3
_ALONE = ("L8", "L9")
_SIMULATED_PATIENCE = 10.0
"""Levels that measure time: nothing else runs beside them."""

Listener = Callable[[TestOutcome], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What to run: of these levels all tests, or those in `only`. `environ` is what children start from.

    A child must begin its first test within `start_s`, and fixtures of a test must stand within `setup_s`.
    """

    platform: str
    levels: tuple[str, ...]
    workers: int = 1
    only: frozenset[str] | None = None
    suite: Path = SUITE
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    start_s: float = 180.0
    setup_s: float = 60.0

    def wants(self, case: TestCase) -> bool:
        """Say whether a test is to run."""
        return case.declaration.level in self.levels and (self.only is None or case.test_id in self.only)


@dataclass(slots=True)
class Run:
    """Where a run stands: all cases, the description of the platform, the outcomes so far."""

    cases: tuple[TestCase, ...]
    selected: tuple[TestCase, ...]
    description: dict[str, Any]
    outcomes: dict[str, TestOutcome] = field(default_factory=dict)
    interrupted: str = ""

    @property
    def patience(self) -> float:
        """Return how many times the deadline of a test it may take: more on a device that is only simulated."""
        device = self.description.get("device") or {}
        return _SIMULATED_PATIENCE if device.get("capabilities", {}).get("simulated") else 1.0

    def ordered(self) -> tuple[TestOutcome, ...]:
        """Return the outcomes in the order of collection; what has none yet was not run."""
        reason = self.interrupted or "the run has not come to it"
        blank = (TestOutcome(c.test_id, c.declaration, Verdict.NOT_RUN, reason) for c in self.selected)
        return tuple(self.outcomes.get(outcome.test_id, outcome) for outcome in blank)


class Supervisor:
    """One run. `listen` hears each outcome as it comes."""

    def __init__(self, options: RunOptions, listen: Listener) -> None:
        self._options = options
        self._listen = listen
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._faults: list[BaseException] = []
        self._opening_crashes = 0

    def prepare(self) -> Run:
        """Collect the suite and describe the platform.

        Raises `ConfigError` with the nearest name on an unknown platform, `ContractError` on a broken suite.
        """
        description = self._describe()
        if "unknown" in description:
            raise ConfigError(description["unknown"])
        cases = collect(self._options)
        selected = tuple(case for case in cases if self._options.wants(case))
        return Run(cases, selected, description)

    def execute(self, run: Run) -> None:
        """Run what is selected; `run` fills as outcomes come. KeyboardInterrupt stops all children and is raised."""
        self._excuse(run, [case for case in run.selected if _needs_platform(case)], _why_not(run.description))
        open_cases = [case for case in run.selected if case.test_id not in run.outcomes]
        together = [case for case in open_cases if case.declaration.level not in _ALONE]
        alone = [case for case in open_cases if case.declaration.level in _ALONE]
        try:
            self._run_all(run, _portions(together, self._options.workers), self._options.workers)
            self._run_all(run, _portions(alone, 1), 1)
        except BaseException as error:
            self._stopped.set()
            run.interrupted = f"the run was interrupted ({type(error).__name__})"
            raise

    def _run_all(self, run: Run, portions: Iterable[list[TestCase]], workers: int) -> None:
        waiting: queue.SimpleQueue[list[TestCase]] = queue.SimpleQueue()
        for portion in portions:
            waiting.put(portion)
        threads = [threading.Thread(target=self._work, args=(run, waiting)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            self._stopped.set()
            for thread in threads:
                thread.join()
            raise
        if self._faults:
            raise self._faults[0]

    def _work(self, run: Run, waiting: "queue.SimpleQueue[list[TestCase]]") -> None:
        try:
            while not self._stopped.is_set():
                try:
                    portion = waiting.get_nowait()
                except queue.Empty:
                    return
                self._run_portion(run, portion)
        except BaseException as error:
            self._faults.append(error)
            self._stopped.set()

    def _run_portion(self, run: Run, portion: list[TestCase]) -> None:
        """Run tests in one child after another until each has an outcome."""
        left = portion
        while left and not self._stopped.is_set():
            if self._opening_crashes >= _MAX_OPENING_CRASHES:
                self._excuse(
                    run, [c for c in left if c.needs_device], "opening the device crashed three times in a row"
                )
            left = [case for case in left if case.test_id not in run.outcomes]
            if left:
                self._run_child(run, left)
            left = [case for case in left if case.test_id not in run.outcomes]

    def _run_child(self, run: Run, cases: Sequence[TestCase]) -> None:
        by_id = {case.test_id: case for case in cases}
        with tempfile.TemporaryDirectory(prefix="zif-conform-") as folder:
            asked = Path(folder) / "tests.txt"
            asked.write_text("\n".join(by_id), encoding="utf-8")
            process = _start_pytest(self._options, cases, ["--zif-tests", str(asked), "--basetemp", f"{folder}/pytest"])
            options = replace(self._options, setup_s=self._options.setup_s * run.patience)
            follower = _Follower(process, by_id, options, self._stopped, run.patience)
            for outcome in follower.outcomes():
                self._note(run, outcome)
            ended = follower.end()
        if self._stopped.is_set() and follower.running is None:
            return
        self._account(run, follower, cases, ended)

    def _account(self, run: Run, follower: "_Follower", cases: Sequence[TestCase], ended: Ended) -> None:
        """Say what became of the test that the child ended in, or of all when it never began."""
        if self._stopped.is_set():
            return
        detail = f"{ended.how}\n{ended.log_tail}"
        if follower.running is not None:
            self._opening_crashes += 1 if follower.in_setup and follower.running.needs_device else 0
            seconds = time.monotonic() - follower.since
            self._note(run, _outcome(follower.running, Verdict.CRASHED, detail, seconds))
        elif not follower.num_finished:
            for case in cases:
                self._note(run, _outcome(case, Verdict.CRASHED, f"no test of the process began: {detail}"))
        if follower.num_called:
            self._opening_crashes = 0

    def _excuse(self, run: Run, cases: Iterable[TestCase], why: str) -> None:
        for case in cases if why else ():
            self._note(run, _outcome(case, Verdict.NOT_RUN, why))

    def _note(self, run: Run, outcome: TestOutcome) -> None:
        with self._lock:
            if outcome.test_id not in run.outcomes:
                run.outcomes[outcome.test_id] = outcome
                self._listen(outcome)

    def _describe(self) -> dict[str, Any]:
        """Gather what the describing process says before it ends, dies or is killed."""
        arguments = ["--platform", self._options.platform, "--descriptor", "{events}", "--lifeline", "{lifeline}"]
        process = TalkingProcess("zif_conformance.describe", arguments, self._options.environ)
        gathered: dict[str, Any] = {}
        deadline = time.monotonic() + self._options.start_s
        while part := process.read(deadline):
            gathered |= part
        ended = (
            process.finish() if process.at_end else process.kill(f"did not end within {self._options.start_s:.0f} s")
        )
        if not ended.clean:
            gathered.setdefault("error", f"the describing process {ended.how}: {ended.log_tail}")
        return gathered


def collect(options: RunOptions) -> tuple[TestCase, ...]:
    """Return all tests of the suite. Raises `ContractError` when it cannot be collected."""
    # Collection computes a little, on the reference alone: one thread, whatever the machine does besides.
    quiet = replace(options, environ={**options.environ, "OMP_NUM_THREADS": "1"})
    process = _start_pytest(quiet, (), ["--collect-only", "-q"])
    event = process.read(time.monotonic() + options.start_s)
    ended = process.finish() if event else process.kill("collection did not end")
    if event is None or not ended.clean:
        raise ContractError(f"the suite could not be collected: {ended.how}\n{ended.log_tail}")
    return tuple(map(case_from_json, event["cases"]))


def _start_pytest(options: RunOptions, cases: Sequence[TestCase], more: Sequence[str]) -> TalkingProcess:
    files = sorted({case.node_id.partition("::")[0] for case in cases})
    paths = [str(options.suite / file) for file in files] or [str(options.suite)]
    fixed = ["-c", str(SUITE / "pytest.ini"), "--rootdir", str(options.suite), "-p", "zif_conformance.plugin"]
    events = ["--zif-events", "{events}", "--zif-platform", options.platform]
    return TalkingProcess("zif_conformance.child", ["{lifeline}", *fixed, *events, *more, *paths], options.environ)


class _Follower:
    """Reads a child's events up to its end, or kills it at a deadline."""

    def __init__(
        self,
        process: TalkingProcess,
        cases: Mapping[str, TestCase],
        options: RunOptions,
        stopped: threading.Event,
        patience: float,
    ) -> None:
        self._process = process
        self._patience = patience
        self._options = options
        self._cases = cases
        self._stopped = stopped
        self._late = False
        self.running: TestCase | None = None
        self.in_setup = True
        self.since = time.monotonic()
        self.num_called = 0
        self.num_finished = 0

    def outcomes(self) -> Iterable[TestOutcome]:
        """Yield outcomes as tests finish, until the child says no more or a deadline passes."""
        deadline = time.monotonic() + self._options.start_s
        while not self._stopped.is_set():
            event = self._process.read(min(deadline, time.monotonic() + 0.5))
            if event is None:
                if not self._process.at_end and time.monotonic() < deadline:
                    continue
                self._late = not self._process.at_end
                return
            deadline = time.monotonic() + self._take(event)
            if event["event"] == "finished":
                yield finished_outcome(self._cases[event["id"]], event)

    def end(self) -> Ended:
        """Wait for the child, or kill it when it is late or the run is stopped."""
        if self._stopped.is_set():
            return self._process.kill("stopped with the run")
        if self._late:
            seconds = time.monotonic() - self.since
            return self._process.kill(f"no end after {seconds:.0f} s, past the deadline: the process was killed")
        return self._process.finish()

    def _deadline_s(self, case: TestCase) -> float:
        return case.declaration.deadline_s * self._patience

    def _take(self, event: dict[str, Any]) -> float:
        """Take in one event; return how long the next may take."""
        kind = event["event"]
        if kind == "started":
            self.running, self.in_setup, self.since = self._cases[event["id"]], True, time.monotonic()
            return max(self._options.setup_s, self._deadline_s(self.running))
        if kind == "called" and self.running is not None:
            self.in_setup = False
            self.num_called += 1
            return self._deadline_s(self.running)
        if kind == "finished":
            self.running = None
            self.num_finished += 1
            return self._options.setup_s
        return self._options.start_s


def _portions(cases: Sequence[TestCase], workers: int) -> list[list[TestCase]]:
    """Cut tests into what one child runs: a level, or a file when several children run; isolated tests alone."""
    portions: dict[str, list[TestCase]] = {}
    for case in cases:
        shared = case.declaration.level if workers == 1 else case.node_id.partition("::")[0]
        portions.setdefault(case.test_id if case.declaration.isolated else shared, []).append(case)
    return list(portions.values())


def _needs_platform(case: TestCase) -> bool:
    return case.declaration.level != "L0"


def _why_not(description: Mapping[str, Any]) -> str:
    """Return why no test beyond L0 can run, or nothing."""
    if "device" in description:
        return ""
    return f"the platform could not be described: {description.get('error', 'no reason was given')}"


def _outcome(case: TestCase, verdict: Verdict, detail: str, seconds: float = 0.0) -> TestOutcome:
    return TestOutcome(case.test_id, case.declaration, verdict, detail, seconds)


def finished_outcome(case: TestCase, event: Mapping[str, Any]) -> TestOutcome:
    """Return the outcome that a child's "finished" event tells."""
    measurements = tuple(Measurement(m["gate"], m["error"], m["limit"], m["what"]) for m in event["measurements"])
    return TestOutcome(
        case.test_id,
        case.declaration,
        Verdict(event["outcome"]),
        event["detail"],
        event["duration_s"],
        tuple(event["missing"]),
        tuple(event["proven"]),
        measurements,
    )
