"""Fixtures of the suite's own tests: small suites, and plugins that misbehave, installed into folders on the path."""

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from zif_conformance.outcomes import TestOutcome
from zif_conformance.supervisor import Run, RunOptions, Supervisor

_TOY = """
import dataclasses

from zif.contract import *
from zif.null.platform import NullDevice, NullPlatform

class ToyPlatform(NullPlatform):
    name = "toy"

    def probe(self):
        # The null platform says that it computes nothing, and has nothing to prove; a toy has.
        (device,) = super().probe().devices
        claims = dataclasses.replace(device.capabilities, notes=())
        return Probe((dataclasses.replace(device, capabilities=claims),), steps=("looked",))

    def plan(self, workload):
        answer = super().plan(workload)
        return dataclasses.replace(answer, platform="toy")

@hookimpl
def zif_platform():
    return ToyPlatform()
"""


@dataclass(frozen=True)
class Lab:
    """A folder with plugins and one with a suite."""

    site: Path
    suite: Path

    def plugin(self, more: str = "", name: str = "toy", files: dict[str, str] | None = None) -> None:
        """Install a plugin whose module is a working one with `more` after it."""
        package = self.site / f"zif_{name}"
        package.mkdir()
        (package / "__init__.py").write_text('"""A plugin for tests."""\n')
        source = _TOY.replace('"toy"', repr(name)) + textwrap.dedent(more)
        (package / "plugin.py").write_text(source)
        for file, text in (files or {}).items():
            (package / file).write_text(textwrap.dedent(text))
        info = self.site / f"zif_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: zif-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[zif.v1]\n{name} = zif_{name}.plugin\n")

    def tests(self, source: str, file: str = "test_l1_small.py") -> None:
        """Write one file of the suite."""
        head = "import os, signal, sys, threading, time\nimport pytest\nfrom zif_conformance.marks import *\n"
        (self.suite / file).write_text(head + textwrap.dedent(source))

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.site)}

    def options(self, **changes: object) -> RunOptions:
        defaults = {"platform": "toy", "levels": ("L0", "L1"), "suite": self.suite, "environ": self.environ}
        return RunOptions(**{**defaults, "start_s": 30.0, "setup_s": 2.0, **changes})

    def run(self, **changes: object) -> dict[str, TestOutcome]:
        return {outcome.test_id: outcome for outcome in self.standing(**changes).ordered()}

    def standing(self, **changes: object) -> Run:
        supervisor = Supervisor(self.options(**changes), lambda outcome: None)
        run = supervisor.prepare()
        supervisor.execute(run)
        return run


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    site, suite = tmp_path / "site", tmp_path / "suite"
    site.mkdir()
    suite.mkdir()
    return Lab(site, suite)
