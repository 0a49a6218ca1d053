"""Importing the light rooms of core imports no array library, and quickly."""

import subprocess
import sys

import pytest

_LIGHT = [
    "zif",
    "zif.cli.main",
    "zif.contract",
    "zif.engine",
    "zif.errors",
    "zif.kv",
    "zif.null.plugin",
    "zif.parsing.parser",
    "zif.plugins",
    "zif.scheduling",
    "zif.settings",
    "zif.simulation",
    "zif.text",
]
_HEAVY = ("torch", "transformers")


@pytest.mark.parametrize("module", _LIGHT)
def test_importing_brings_no_array_library(module):
    script = f"import sys, {module}; print([name for name in {_HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
