"""What the documents show is run: shell lines, Python blocks, links, and the plugin that the walk-through quotes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "examples/embedded_model/README.md"])
ACME = ROOT / "core/tests/plugins/acme"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def blocks(language: str, document: Path) -> list[str]:
    return [text for found, text in BLOCK.findall(document.read_text()) if found == language]


def shell_lines() -> list[str]:
    lines = [line for document in DOCUMENTS for block in blocks("sh", document) for line in block.splitlines()]
    return sorted({line for line in lines if line.strip()})


def python_blocks() -> list[str]:
    return [block for document in DOCUMENTS if document.name != "plugins.md" for block in blocks("python", document)]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("zif ")])
def test_command_runs(line: str) -> None:
    pytest.importorskip("zif_cpu")
    command = [sys.executable, "-m", "zif.cli", *shlex.split(line)[1:]]
    environment = {**os.environ, "ZIF_CPU_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", python_blocks())
def test_python_block_runs(block: str) -> None:
    pytest.importorskip("zif_cpu")
    environment = {**os.environ, "ZIF_CPU_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", block],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_other_commands_are_those_that_the_build_machine_runs() -> None:
    machine = (ROOT / ".ci/run").read_text()
    for line in shell_lines():
        assert line.startswith("zif ") or line in machine, f"{line!r} is shown and never run"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_walk_through_quotes_the_plugin_word_for_word() -> None:
    sources = [path.read_text() for path in [*ACME.rglob("*.py"), ACME / "pyproject.toml"]]
    quoted = [block for language in ("python", "toml") for block in blocks(language, ROOT / "docs/plugins.md")]
    assert quoted
    for block in quoted:
        assert any(block in source for source in sources), f"not in the plugin:\n{block}"
