"""The watch over code made of data sees it in the server's code, directly or through a library, and nowhere else."""

import subprocess
import sys

import pytest

from support.audited.code_audit import ROOMS

PICKLE = "b'cos\\ngetcwd\\n.'"
CASES = {
    "pickle": f"import pickle; pickle.loads({PICKLE})",
    "pickle in Python": f"import io, pickle; pickle._Unpickler(io.BytesIO({PICKLE})).load()",
    "multiprocessing": f"import multiprocessing.reduction as r; r.ForkingPickler.loads({PICKLE})",
    "marshal": "import marshal; marshal.loads(marshal.dumps(1))",
    "exec": "exec('1')",
    "eval": "eval('1')",
    "shell": "import os; os.system('true')",
}
HARMLESS = "import collections, dataclasses, email.mime.text, wave; collections.namedtuple('A', 'b')"


def run(source: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run code, as if it stood in a file, in a process such as the server's own."""
    program = f"exec(compile({source!r}, {path!r}, 'exec'))"
    return subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("case", CASES)
def test_each_way_is_seen_in_a_process_that_tests_start(case: str) -> None:
    seen = run(CASES[case], ROOMS[0] + "made_up.py")
    assert seen.returncode == 1
    assert "data becomes code" in seen.stderr
    assert "serving/made_up.py" in seen.stderr


def test_other_code_may_and_imports_of_the_server_are_no_offence() -> None:
    for source in CASES.values():
        assert run(source, "/elsewhere/made_up.py").returncode == 0
    assert run(HARMLESS, ROOMS[0] + "made_up.py").stderr == ""
