"""Runs one check in a fresh interpreter, with a deadline, and returns what it found as JSON.

The check is a function of `zif_conformance.package.checks`. A process that dies or hangs is an `AssertionError` of the
test that asked. `python -m zif_conformance.package.fresh` is the other side.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_DEADLINE_S = 45.0
_TAIL = 2000


def run_fresh(check: str, platform: str, option: str = "") -> Any:
    """Run the check on the platform and return its answer. Raises `AssertionError` when it does not answer."""
    with tempfile.TemporaryDirectory(prefix="zif-fresh-") as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, "-m", __name__, str(answer), check, platform, option]
        with log.open("wb") as output:
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=_DEADLINE_S, check=False
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise AssertionError(f"{check} did not end within {_DEADLINE_S} s in a fresh process") from error
        tail = log.read_text(errors="replace")[-_TAIL:]
        if code != 0 or not answer.exists():
            raise AssertionError(f"{check} ended a fresh process with code {code}:\n{tail}")
        return json.loads(answer.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    """Run one check and write its answer."""
    from zif_conformance.package import checks

    path, check, platform, option = arguments
    found = getattr(checks, check)(platform, option)
    Path(path).write_text(json.dumps(found), encoding="utf-8")
    # Without the interpreter's own end: threads of libraries that were loaded are not what is tested here.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
