"""Rounds: in each, floors are measured and every engine runs once in a process of its own, in an order that turns.

What ran is saved after each process. An engine that fails leaves its error with the round and as a note; the others
go on.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu import machine
from cpu.cap import Cap, why_left_out
from cpu.engines import Engine, command_of, options_of, prepare_weights, variables_of
from cpu.environments import PeerError, prepare, python_of
from cpu.figures import figures_of
from cpu.process import EngineProcess
from cpu.results import Results
from cpu.workloads import MAIN, Workload, cold_start, warm_up

START_S = 900
"""Longest start: vLLM compiled for minutes on a machine of this class."""
IDLE_ENGINES = "zif"
"""Engines whose processor time without requests is measured, in the first round, begin with this."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: engines, workloads by name, and how often: the main workloads in all rounds, others in the first."""

    engines: Sequence[Engine]
    workloads: Mapping[str, Workload]
    num_rounds: int
    folder: Path
    threads: int
    idle_s: float
    timeout_s: float
    command: str
    num_other_rounds: int = 1
    cap: Cap | None = None

    @property
    def variables(self) -> Mapping[str, str]:
        """Return the environment variables that every process gets, whatever the engine."""
        return self.cap.variables if self.cap else {}


def set_up(plan: Plan) -> dict[str, str]:
    """Make environments and weights; return what failed, by the engine's name."""
    failed = {}
    for engine in plan.engines:
        if reason := why_left_out(plan.cap, engine):
            failed[engine.name] = reason
            continue
        try:
            prepare(plan.folder, engine.environment)
            for model in models_of(plan):
                prepare_weights(plan.folder, engine, model)
        except PeerError as error:
            _say(f"{engine.name}: {error}")
            failed[engine.name] = f"could not be set up: {error}"
    return failed


def run(plan: Plan, results: Results) -> None:
    """Run all rounds; results are saved after each process."""
    failed = set_up(plan)
    for engine in plan.engines:
        results.data["notes"].pop(engine.name, None)  # of an earlier run
    for name, text in failed.items():
        results.note(name, text)
    results.save(plan.command)
    usable = [engine for engine in plan.engines if engine.name not in failed]
    for round_index in range(plan.num_rounds):
        if not any(_missing(plan, results, engine, round_index) for engine in usable):
            continue
        results.add_floors(round_index, measure_floors(plan))
        turn = round_index % max(1, len(usable))
        for engine in [*usable[turn:], *usable[:turn]]:
            for model, names in _missing(plan, results, engine, round_index).items():
                _say(f"round {round_index + 1}: {engine.name}, {', '.join(names)}")
                _run_engine(plan, results, (engine, model, round_index), names)
                results.save(plan.command)


def models_of(plan: Plan) -> list[str]:
    """Return the models that the workloads ask for, in their order."""
    return list(dict.fromkeys(workload.model for workload in plan.workloads.values()))


def measure_floors(plan: Plan) -> dict[str, float]:
    """Return what the machine can do now."""
    command = [str(python_of(plan.folder, "zif")), "-m", "cpu.floors", str(plan.folder), str(plan.threads)]
    folder, variables = Path(__file__).parents[1], {**os.environ, **plan.variables}
    measured = subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True, text=True)
    floors: dict[str, float] = json.loads(measured.stdout)
    return floors


def _missing(plan: Plan, results: Results, engine: Engine, round_index: int) -> dict[str, list[str]]:
    """Return the workloads that the engine still has to run in a round, by model."""
    if round_index >= engine.max_rounds:
        return {}
    found = {}
    for model in models_of(plan):
        due = plan.workloads if round_index < plan.num_other_rounds else plan.workloads.keys() & MAIN
        names = [name for name, workload in plan.workloads.items() if workload.model == model and name in due]
        if left := results.missing(engine.name, model, round_index, names):
            found[model] = left
    return found


def _run_engine(plan: Plan, results: Results, key: tuple[Engine, str, int], names: Sequence[str]) -> None:
    engine, model, round_index = key
    entry = results.run_of(engine.name, model, round_index)
    entry |= {"sources": machine.source_digest(), "load_before": round(os.getloadavg()[0], 2), "errors": {}}
    at, subject, started = "start", f"{engine.name}, {model}", time.perf_counter()
    try:
        options = options_of(plan.folder, engine, model, plan.threads)
        variables = {**variables_of(engine, plan.threads), **plan.variables}
        with EngineProcess(command_of(plan.folder, engine), options, variables) as process:
            results.data["versions"][engine.name] = _start(process, entry, plan.cap)
            if engine.name.startswith(IDLE_ENGINES) and round_index == 0 and model == "dense" and plan.idle_s:
                entry["idle_cores"] = _idle_cores(process, plan.idle_s)
            for at in names:
                entry["workloads"][at] = _run_workload(process, plan.workloads[at], plan.timeout_s)
                entry["peak_bytes"] = process.session.peak_bytes()
    except PeerError as error:
        _say(f"{engine.name}, {at}: {error}")
        entry["errors"][at] = str(error)
        results.note(subject, f"{at}: {error}")
    else:
        results.data["notes"].pop(subject, None)
    entry["took_s"] = round(time.perf_counter() - started, 1)


def _start(process: EngineProcess, entry: dict[str, Any], cap: Cap | None) -> dict[str, Any]:
    """Wait for the engine, have one token answered, warm it up; return what it says of itself.

    Raises `PeerError` when one of its processes computes without the cap.
    """
    about = process.wait_ready(START_S)
    entry["load_s"] = round(about["load_s"], 3)
    entry["ready_s"] = round(time.perf_counter() - process.started, 3)
    process.ask(cold_start().requests, START_S)
    entry["first_token_s"] = round(time.perf_counter() - process.started, 3)
    process.ask(warm_up().requests, START_S)
    entry["start_cpu_s"] = round(process.session.cpu_s(), 1)
    if cap and (free := process.session.without(cap.library)):
        raise PeerError(f"not capped at {cap.isa}: {len(free)} of its processes run without the cap")
    capped = {"cap": cap.isa} if cap else {}
    return {"versions": about["versions"], "configuration": {**capped, **about["configuration"]}}


def _run_workload(process: EngineProcess, workload: Workload, timeout_s: float) -> dict[str, Any]:
    if workload.primer:
        process.ask(workload.primer, timeout_s)
    before = process.session.cpu_s()
    answered = process.ask(workload.requests, timeout_s)
    used = process.session.cpu_s() - before
    figures = figures_of(workload, answered["token_s"], answered["wall_s"])
    return {**figures, "cores_used": round(used / answered["wall_s"], 3)}


def _idle_cores(process: EngineProcess, idle_s: float) -> float:
    """Return how many cores the engine's processes use while nobody asks."""
    before, started = process.session.cpu_s(), time.perf_counter()
    time.sleep(idle_s)
    return round((process.session.cpu_s() - before) / (time.perf_counter() - started), 5)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
