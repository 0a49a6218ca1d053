"""The contract's clauses and the tests hold each other: no clause without a test, no test without a clause."""

import ast
from pathlib import Path

import pytest

from zif_conformance.clauses import clauses_page, other_tests, read_clauses, suite_tests
from zif_conformance.marks import LEVELS
from zif_conformance.supervisor import RunOptions, collect

_ROOT = Path(__file__).parents[2]
_CONTRACT = (_ROOT / "docs/contract.md").read_text(encoding="utf-8")
_CLAUSES = read_clauses(_CONTRACT)


@pytest.fixture(scope="module")
def suite():
    return suite_tests(collect(RunOptions("null", LEVELS)))


def test_the_clauses_are_read_in_order_and_none_is_missed():
    numbers = [clause.number for clause in _CLAUSES]
    assert len(numbers) == _CONTRACT.count("\n- **")
    assert numbers == sorted(set(numbers), key=lambda number: tuple(map(int, number.split("."))))
    for chapter in {number.partition(".")[0] for number in numbers}:
        inside = [number for number in numbers if number.partition(".")[0] == chapter]
        assert inside == [f"{chapter}.{i}" for i in range(1, len(inside) + 1)]


@pytest.mark.slow
def test_every_clause_has_a_test_and_every_test_an_existing_clause(suite):
    numbers = {clause.number for clause in _CLAUSES}
    assert numbers - suite.keys() - other_tests().keys() == set()
    assert (suite.keys() | other_tests().keys()) - numbers == set()


@pytest.mark.parametrize("clause", other_tests())
def test_tests_outside_the_suite_exist(clause):
    for name in other_tests()[clause]:
        path, _, function = name.partition("::")
        tree = ast.parse((_ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in functions if function else any(found.startswith("test_") for found in functions), name


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(suite):
    page = (_ROOT / "docs/contract-tests.md").read_text(encoding="utf-8")
    assert page == clauses_page(_CLAUSES, suite, other_tests()), "run `make freeze`, read the difference, commit it"


def test_the_page_shows_a_clause_without_a_test():
    assert "**none**" in clauses_page(_CLAUSES, {}, {})
