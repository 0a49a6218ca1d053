"""The self-test of the suite: its bank, how a fault is put in and taken out, and what becomes of crashes and hangs."""

import ast
from pathlib import Path

import pytest

from zif.cli.main import main
from zif.errors import ConfigError, EngineError
from zif_conformance.mutants import selftest
from zif_conformance.mutants.bank import Edit, all_mutants, all_variants, by_name
from zif_conformance.mutants.patching import PLATFORM, applied, edited_copy, edited_source
from zif_conformance.mutants.selftest import KILLERS, SelfTest, Trial, killers_text, read_killers
from zif_conformance.processes import Ended
from zif_conformance.reference_platform import (
    attention,
    codes,
    collectives,
    device,
    memory,
    operators,
    platform,
    quantized,
)

_PLATFORM = Path(platform.__file__).parent
_MODULES = (attention, codes, collectives, device, memory, operators, platform, quantized)


def test_the_bank_is_large_and_says_what_it_holds():
    mutants, variants = all_mutants(), all_variants()
    assert len(mutants) >= 100
    assert len(variants) >= 20
    assert {mutant.level for mutant in mutants} >= {"L0", "L1", "L2", "L3", "L4", "L5", "L6"}
    assert len(by_name(mutants, variants)) == len(mutants) + len(variants)
    assert all(mutant.broken.endswith(".") and mutant.origin for mutant in mutants)


@pytest.mark.parametrize("subject", [*all_mutants(), *all_variants()], ids=lambda subject: subject.name)
def test_every_change_fits_the_platform_and_changes_it(subject):
    for file in {edit.file for edit in subject.edits}:
        source = (_PLATFORM / file).read_text()
        changed = edited_source(source, [edit for edit in subject.edits if edit.file == file])
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


def test_no_two_mutants_of_a_level_are_the_same_change():
    changes = [(mutant.level, frozenset(mutant.edits)) for mutant in all_mutants()]
    assert len(set(changes)) == len(changes)


def test_every_mutant_has_a_known_killer():
    known = read_killers()
    assert {mutant.name for mutant in all_mutants()} == set(known)
    suite = {path.name: path.read_text() for path in (_PLATFORM.parent / "suite").glob("test_*.py")}
    for killer in known.values():
        file, _, test = killer.partition("::")
        assert f"def {test.partition('[')[0]}(" in suite[Path(file).name], killer


def _everything():
    """Return what the modules of the platform are made of: code, defaults and data."""
    found = {}
    for module in _MODULES:
        for name, value in list(vars(module).items()):
            owners = {"": {name: value}, **({name: vars(value)} if isinstance(value, type) else {})}
            for owner, members in owners.items():
                for key, member in members.items():
                    place = (module.__name__, owner, key)
                    found[place] = (
                        id(member),
                        getattr(member, "__code__", None),
                        getattr(member, "__defaults__", None),
                    )
    return found


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in all_mutants() if not mutant.fresh], ids=lambda mutant: mutant.name
)
def test_a_fault_is_put_in_and_taken_out_whole(mutant):
    before = _everything()
    with applied(mutant.edits):
        assert _everything() != before
    assert _everything() == before


def test_a_fault_is_taken_out_when_its_test_raises():
    before = _everything()
    with pytest.raises(KeyError), applied(by_name(all_mutants(), ())["memory-misaligned"].edits):
        raise KeyError
    assert _everything() == before


@pytest.mark.parametrize("before", ["no such line", "self"], ids=["missing", "many times"])
def test_a_place_that_is_not_there_once_is_refused(before):
    with pytest.raises(ConfigError, match="write the edit anew"), applied([Edit("memory.py", before, "pass")]):
        pass


def test_a_copy_has_the_fault_and_the_package_has_not(tmp_path):
    mutant = by_name(all_mutants(), ())["package-wrong-name"]
    folder = edited_copy(mutant.edits, tmp_path)
    copied = folder / PLATFORM.replace(".", "/") / "platform.py"
    assert mutant.edits[0].after in copied.read_text()
    assert mutant.edits[0].after not in (_PLATFORM / "platform.py").read_text()


class _Scripted:
    """A process that says prepared lines and ends; one script per process that is started."""

    scripts: list[tuple[list[dict[str, object]], bool]]

    def __init__(self, module, arguments, environ):
        self._events, self.at_end = self.scripts.pop(0)

    def read(self, deadline):
        return self._events.pop(0) if self._events else None

    def finish(self):
        return Ended("ended by SIGSEGV", "log", clean=False)

    def kill(self, why):
        return Ended(why, "log", clean=False)


def _tried(name, *failed):
    return {"event": "tried", "name": name, "failed": list(failed), "tests": 1, "detail": ""}


def _run(monkeypatch, scripts, mutants):
    monkeypatch.setattr(selftest, "TalkingProcess", _Scripted)
    monkeypatch.setattr(_Scripted, "scripts", scripts, raising=False)
    test = SelfTest(mutants, (), lambda subject, trial: None)
    test.run()
    assert not scripts
    return test


@pytest.mark.parametrize("dies", [True, False], ids=["crash", "hang"])
def test_a_mutant_that_crashes_or_hangs_is_killed_and_the_next_is_tried(monkeypatch, dies):
    mutants = [mutant for mutant in all_mutants() if mutant.level == "L1"][:3]
    first, second, third = (mutant.name for mutant in mutants)
    base = ([_tried(f"{selftest.BASELINE}, L1")], True)
    scripts = [
        base,
        ([_tried(first), {"event": "started", "name": second}, {"event": "runs", "name": second, "test": "t"}], dies),
        ([_tried(third, "u")], True),
    ]
    test = _run(monkeypatch, scripts, mutants)
    assert [mutant.name for mutant in test.survivors] == [first]
    assert test.trials[second].failed == ("t",)
    assert test.trials[second].crash == ("ended by SIGSEGV" if dies else "hung and was killed")


def test_a_process_that_ends_badly_after_its_work_kills_nobody(monkeypatch):
    (mutant,) = [mutant for mutant in all_mutants() if mutant.level == "L1"][:1]
    scripts = [([_tried(f"{selftest.BASELINE}, L1")], True), ([_tried(mutant.name)], True)]
    assert _run(monkeypatch, scripts, [mutant]).survivors == [mutant]


@pytest.mark.parametrize("begun", [[], [{"event": "started", "name": "the platform"}]], ids=["before", "within"])
def test_a_suite_that_cannot_run_kills_nobody(monkeypatch, begun):
    mutants = [mutant for mutant in all_mutants() if mutant.level == "L1"][:1]
    with pytest.raises(EngineError, match="SIGSEGV"):
        _run(monkeypatch, [(begun, True)], mutants)


def test_killers_that_are_known_stay_in_the_list():
    text = killers_text([Trial("b", ("f::u",), 1), Trial("c", (), 9)], {"a": "f::t", "b": "f::old"})
    assert text.splitlines()[1:] == ["a\tf::t", "b\tf::u"]
    assert KILLERS.exists()


def test_a_name_that_no_mutant_has_is_refused(capsys):
    assert main(["conform", "self-test", "--mutant", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_kills_mutants_and_lets_variants_pass(capsys):
    names = ["memory-misaligned", "memory-limit-ignored", "variant-alignment-larger"]
    assert main(["conform", "self-test", *(word for name in names for word in ("--mutant", name))]) == 0
    printed = capsys.readouterr().out
    assert "all: killed 2 of 2 mutants (100 %), false alarms 0 of 1 variants (0 %)" in printed
    assert "killed      memory-misaligned: " in printed


@pytest.mark.slow
def test_a_mutant_that_lives_through_its_killer_is_named(capsys, monkeypatch, tmp_path):
    killers = tmp_path / "killers.txt"
    harmless = "test_l1_device.py::test_close_is_idempotent_and_gives_everything_back"
    killers.write_text(f"memory-misaligned\t{harmless}\n")
    monkeypatch.setattr(selftest, "KILLERS", killers)
    assert main(["conform", "self-test", "--quick", "--mutant", "memory-misaligned"]) == 1
    assert "survivors: memory-misaligned" in capsys.readouterr().out
