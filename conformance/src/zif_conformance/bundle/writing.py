"""Writes a bundle: the sealed result and everything that is drawn from it.

`result.json` comes last and is put in place in one move, so that a run that is killed at any moment leaves either the
bundle before or the bundle after.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zif.errors import ConfigError
from zif_conformance.bundle.junit import junit_xml
from zif_conformance.bundle.matrix import matrix_markdown
from zif_conformance.bundle.page import report_page
from zif_conformance.bundle.result import digest_of

RESULT = "result.json"
DRAWN = ("junit.xml", "matrix.md", "report.html")
"""The files that follow from the result alone."""


def drawn_files(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of every file that follows from the result."""
    makers = (junit_xml, matrix_markdown, report_page)
    return {name: make(result) for name, make in zip(DRAWN, makers, strict=True)}


def write_bundle(folder: Path, result: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, Any]:
    """Write all files and return the sealed result."""
    files = {
        **drawn_files(result),
        "dispatch.json": _json({name: description.get(name) for name in ("platform", "dispatch", "observed")}),
        "environment.json": _json(description.get("environment", {})),
    }
    for name, text in files.items():
        _replace(folder / name, text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(files.items())}
    sealed = {**result, "files": hashes}
    sealed["digest"] = digest_of(sealed)
    _replace(folder / RESULT, _json(sealed))
    return sealed


def claim_folder(folder: Path) -> None:
    """Make the folder. Raises `ConfigError` when it holds anything that is no bundle."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir()] if not (folder / RESULT).exists() else []
    except OSError as error:
        raise ConfigError(f"cannot write a bundle to {str(folder)!r}: {error}; choose another folder") from error
    if foreign:
        raise ConfigError(f"folder {str(folder)!r} holds {foreign[0]!r} and no bundle; choose an empty or a new folder")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"
