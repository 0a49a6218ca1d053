"""Budgets of size and shape for the source of core, vendors and conformance suite. An exception carries its reason."""

import ast
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[3]
_MAX_FILE_LINES = 400
_MAX_FUNCTION_LINES = 60
_MAX_PARAMETERS = 6
_MAX_KERNEL_LINES = 130
"""A kernel is one program: its arguments are what the device is given, and what it calls it pays for in clarity."""

# "file:function" -> why a reader would accept it.
_PARAMETER_EXCEPTIONS: dict[str, str] = {}
_FUNCTION_EXCEPTIONS: dict[str, str] = {}
_FILE_EXCEPTIONS: dict[str, str] = {}


def _sources():
    folders = ("core/src", "plugins", "conformance/src")
    return sorted(p for folder in folders for p in (_ROOT / folder).rglob("*.py") if "/build/" not in str(p))


def _name(path):
    return path.relative_to(_ROOT).as_posix()


def _functions():
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{_name(path)}:{node.name}", node


def _num_parameters(node):
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _num_lines(node):
    return node.end_lineno - node.lineno + 1


def _most_lines(node):
    return _MAX_KERNEL_LINES if _is_kernel(node) else _MAX_FUNCTION_LINES


def _is_kernel(node):
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def test_files_are_short():
    long = {_name(p): n for p in _sources() if (n := len(p.read_text(encoding="utf-8").splitlines())) > _MAX_FILE_LINES}
    assert {name: n for name, n in long.items() if name not in _FILE_EXCEPTIONS} == {}


def test_functions_are_short():
    spare = {name: _num_lines(node) - _most_lines(node) for name, node in _functions()}
    long = {name: n for name, n in spare.items() if n > 0}
    assert {name: n for name, n in long.items() if name not in _FUNCTION_EXCEPTIONS} == {}


def test_functions_have_few_parameters():
    # The parameters of a test are fixtures and cases, which pytest passes by name.
    functions = [(name, node) for name, node in _functions() if not _is_kernel(node)]
    called = [(name, node) for name, node in functions if not node.name.startswith("test_")]
    many = {name: n for name, node in called if (n := _num_parameters(node)) > _MAX_PARAMETERS}
    assert {name: n for name, n in many.items() if name not in _PARAMETER_EXCEPTIONS} == {}


@pytest.mark.parametrize("exceptions", [_PARAMETER_EXCEPTIONS, _FUNCTION_EXCEPTIONS, _FILE_EXCEPTIONS])
def test_exceptions_still_exist_and_have_reasons(exceptions):
    known = {name for name, _ in _functions()} | {_name(path) for path in _sources()}
    assert [name for name, reason in exceptions.items() if name not in known or len(reason) < 20] == []


def test_every_source_file_says_what_it_is():
    silent = [_name(p) for p in _sources() if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert [name for name in silent if (_ROOT / name).read_text().strip()] == []
