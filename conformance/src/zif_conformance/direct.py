"""The bundle of a run under plain pytest: always partial, because no other process stood by to see a crash."""

import datetime
from collections.abc import Iterable
from pathlib import Path

from zif_conformance.bundle.result import RunFacts, build_result
from zif_conformance.bundle.writing import claim_folder, write_bundle
from zif_conformance.describe import describe
from zif_conformance.outcomes import TestCase
from zif_conformance.recording import Recorder
from zif_conformance.supervisor import Run, finished_outcome

_WHY = "run under pytest itself, which does not survive a crash or a hang: use zif conform for a verdict"


def write_direct_bundle(platform: str, cases: Iterable[TestCase], recorder: Recorder, folder: Path) -> None:
    """Write the bundle of what the recorder has seen. Raises `ConfigError` when the folder holds something else."""
    claim_folder(folder)
    known = tuple(cases)
    by_id = {case.test_id: case for case in known}
    description = {name: value for part in describe(platform) for name, value in part.items()}
    events = [event for event in recorder.finished if event["id"] in by_id]
    selected = tuple(by_id[event["id"]] for event in events)
    run = Run(known, selected, description, {e["id"]: finished_outcome(by_id[e["id"]], e) for e in events})
    now = datetime.datetime.now(datetime.UTC)
    started = now - datetime.timedelta(seconds=sum(event["duration_s"] for event in events))
    levels = tuple(sorted({case.declaration.level for case in selected})) or ("L0",)
    write_bundle(folder, build_result(run, RunFacts(platform, levels, None, started, now, _WHY)), description)
