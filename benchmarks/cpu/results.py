"""The file of results: one entry per run of an engine's process, saved after each, and found again when it continues.

An entry belongs to an engine, a model and a round. A later run of the same adds workloads to what it lacks; entries of
zif from other sources are dropped, so that a table never mixes two of them.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpu import machine

FORMAT = 1


class Results:
    """Results in memory and on disk."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path = path
        self.data = data

    @classmethod
    def begin(cls, path: Path, quick: bool, fresh: bool, isa: str | None = None) -> "Results":
        """Continue the results at `path`, or begin new ones where that is asked for or has no meaning."""
        about = machine.describe()
        if path.exists() and not fresh:
            data = read(path)
            if (data["quick"], data.get("isa"), data["machine"]) == (quick, isa, about):
                return cls(path, data)._without_other_sources(machine.source_digest())
            print(f"{path} is of another machine, another cap or other traffic: beginning anew", file=sys.stderr)
        capped = {"isa": isa} if isa else {}
        return cls(path, {**_empty(quick), **capped, "machine": about})

    def run_of(self, engine: str, model: str, round_index: int) -> dict[str, Any]:
        """Return the entry of an engine, a model and a round, made when it is not there."""
        run = self._found(engine, model, round_index)
        if run is None:
            run = {"engine": engine, "model": model, "round": round_index, "workloads": {}, "errors": {}}
            self.data["runs"].append(run)
        return run

    def missing(self, engine: str, model: str, round_index: int, names: Iterable[str]) -> list[str]:
        """Return the workloads that have no figures yet."""
        run = self._found(engine, model, round_index)
        return [name for name in names if run is None or name not in run["workloads"]]

    def add_floors(self, round_index: int, floors: dict[str, float]) -> None:
        """Keep what the machine can do, as measured before a round or a part of it."""
        self.data["floors"].append({"round": round_index, **floors})

    def note(self, subject: str, text: str) -> None:
        """Keep a remark on an engine; the same remark is kept once, and a new one replaces an older."""
        self.data["notes"][subject] = text

    def save(self, command: str) -> None:
        """Write the file, all or nothing."""
        if command not in self.data["commands"]:
            self.data["commands"].append(command)
        self.data["commit"] = machine.commit()
        self.data["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        os.replace(partial, self._path)

    def _found(self, engine: str, model: str, round_index: int) -> dict[str, Any] | None:
        key = (engine, model, round_index)
        return next((r for r in self.data["runs"] if (r["engine"], r["model"], r["round"]) == key), None)

    def _without_other_sources(self, digest: str) -> "Results":
        runs = self.data["runs"]
        kept = [run for run in runs if not run["engine"].startswith("zif") or run.get("sources") == digest]
        if len(kept) < len(runs):
            print(f"zif's sources have changed: {len(runs) - len(kept)} of its runs are measured anew", file=sys.stderr)
        self.data["runs"] = kept
        return self


def read(path: Path) -> dict[str, Any]:
    """Read results. Raises `ValueError` for a file of another format."""
    data: dict[str, Any] = json.loads(path.read_text())
    if data.get("format") != FORMAT:
        raise ValueError(f"{path} has format {data.get('format')!r}, this reads {FORMAT}; measure anew with --fresh")
    return data


def _empty(quick: bool) -> dict[str, Any]:
    return {"format": FORMAT, "quick": quick, "commands": [], "runs": [], "floors": [], "notes": {}, "versions": {}}
