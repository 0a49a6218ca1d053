"""`zif conform` without the suite, and with one that is broken."""

import importlib.metadata

import pytest

from zif.cli.main import main


def _entry_points(*found):
    original = importlib.metadata.entry_points

    def answer(**wanted):
        return list(found) if wanted.get("group") == "zif.commands" else original(**wanted)

    return answer


@pytest.mark.parametrize("arguments", [[], ["--platform", "null"], ["verify", "out"], ["--help"]])
def test_without_the_suite_it_says_what_to_install(monkeypatch, capsys, arguments):
    monkeypatch.setattr(importlib.metadata, "entry_points", _entry_points())
    assert main(["conform", *arguments]) == 2
    assert "pip install zif-conformance" in capsys.readouterr().err


def test_a_broken_suite_says_why_and_leaves_the_other_commands_alone(monkeypatch, capsys):
    broken = importlib.metadata.EntryPoint("conform", "no_such_suite.command", "zif.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", _entry_points(broken))
    assert main(["conform", "--platform", "null"]) == 2
    assert "no_such_suite" in capsys.readouterr().err
    assert main(["platforms"]) == 0


def test_with_the_suite_installed_the_suite_answers(monkeypatch, capsys):
    class Suite:
        @staticmethod
        def register(commands):
            commands.add_parser("conform").set_defaults(run=lambda arguments: 7)

    class Found:
        @staticmethod
        def load():
            return Suite

    monkeypatch.setattr(importlib.metadata, "entry_points", _entry_points(Found))
    assert main(["conform"]) == 7
