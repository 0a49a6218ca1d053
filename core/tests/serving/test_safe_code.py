"""What the server must not contain, read from its source; and the table of vulnerability classes names real tests."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "core/src/zif"
ROOMS = ("serving", "parsing", "structured", "text", "engine", "contract")
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml", "gguf"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def faults(tree: ast.AST) -> list[str]:
    """Return what a module does that none may: deserialise to code, evaluate text, load pickled tensors."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        found += [name for name in names if name in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or called == "torch.load":
                found.append(called)
    return found


def test_the_reader_finds_what_is_forbidden():
    code = "import pickle\nfrom yaml import load\neval('1')\ntorch.load('x')\nre.compile('x')"
    assert faults(ast.parse(code)) == ["pickle", "yaml", "eval", "torch.load"]


def test_nothing_in_the_server_unpickles_or_evaluates():
    files = [path for room in ROOMS for path in (SOURCES / room).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): faults(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_class_of_the_table_names_tests_that_exist():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| (`[^|]+`) \|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    assert len(rows) == 26
    for name, tests in rows:
        for path in re.findall(r"`([^`]+)`", tests):
            assert (ROOT / path).is_file(), f"{name}: {path} is no test"
            assert "def test_" in (ROOT / path).read_text(encoding="utf-8"), f"{name}: {path} has no test"
