"""Make and check the environment of each peer. Packages and versions are in `environments.toml`, and only there.

An environment is a folder with a marker that holds what it was made from: it is made again when that changes. Nothing
is cached by pip beside it, so that a folder removed is space regained.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

MARKER = ".made-from.json"
CACHE = Path.home() / ".cache" / "zif" / "benchmarks"
"""Where environments and weights are kept unless told otherwise."""
TABLE = Path(__file__).with_name("environments.toml")


class PeerError(RuntimeError):
    """A peer cannot be made to run; the text says why, and goes into the results' notes."""


def recipes() -> dict[str, dict[str, Any]]:
    """Return what each environment is made from."""
    return tomllib.loads(TABLE.read_text())


def python_of(folder: Path, name: str) -> Path:
    """Return the interpreter of an environment; the one that runs this for "zif"."""
    return Path(sys.executable) if name == "zif" else folder / name / "bin" / "python"


def prepare(folder: Path, name: str) -> None:
    """Make the environment unless it is there. Raises `PeerError` with the end of what pip said."""
    if name == "zif":
        return
    recipe, target = recipes()[name], folder / name
    recorded = target / MARKER
    if recorded.exists() and json.loads(recorded.read_text()) == recipe:
        return
    print(f"making the environment of {name} in {target}", file=sys.stderr)
    if not _is_usable(target):
        shutil.rmtree(target, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(target)], {})
    pip = [str(target / "bin" / "python"), "-m", "pip"]
    install = [*pip, "install", "--no-cache-dir", "--disable-pip-version-check"]
    if recipe["install"]:
        _run([*install, *recipe["install"]], {})
    if source := recipe.get("source"):
        package = source.partition("==")[0]
        _run([*install, "--no-binary", package, "--force-reinstall", "--no-deps", source], recipe["source_environment"])
        # Its own requirements, which are no source builds.
        _run([*install, source], {})
    if recipe.get("remove"):
        _run([*pip, "uninstall", "--yes", *recipe["remove"]], {})
    _run([pip[0], "-c", recipe["check"]], {})
    recorded.write_text(json.dumps(recipe))


def installed(folder: Path, name: str) -> dict[str, str]:
    """Return the versions of every package of an environment."""
    listed = subprocess.run(
        [str(python_of(folder, name)), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}


def _is_usable(target: Path) -> bool:
    return (target / "bin" / "python").exists()


def _run(command: list[str], variables: dict[str, str]) -> None:
    run = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, errors="replace", check=False
    )
    if run.returncode:
        said = (run.stderr or run.stdout).strip().splitlines()[-12:]
        raise PeerError(f"{' '.join(command)[:300]} ended with {run.returncode}: " + "\n".join(said)[-1500:])
