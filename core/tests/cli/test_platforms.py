"""`zif platforms`: what is installed, what it found, and why something failed."""

import importlib.metadata
import json

import pytest

from zif.cli.main import main


def _install(monkeypatch, *entries):
    points = [importlib.metadata.EntryPoint(name, value, "zif.v1") for name, value in entries]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: points)


def test_a_platform_shows_its_device(capsys, monkeypatch):
    _install(monkeypatch, ("null", "zif.null.plugin"))
    assert main(["platforms"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("null  (")
    assert "null:0" in shown


@pytest.mark.parametrize("option", [[], ["--verbose"]])
def test_one_that_fails_to_load_shows_its_reason_and_the_others_go_on(option, capsys, monkeypatch):
    _install(monkeypatch, ("gone", "zif_no_such_package.plugin"), ("null", "zif.null.plugin"))
    assert main(["platforms", *option]) == 0
    shown = capsys.readouterr().out
    assert "gone" in shown
    assert "No module named 'zif_no_such_package'" in shown
    assert "null:0" in shown
    assert ("Traceback" in shown) == bool(option)


def test_json_has_devices_and_failures(capsys, monkeypatch):
    _install(monkeypatch, ("gone", "zif_no_such_package.plugin"), ("null", "zif.null.plugin"))
    assert main(["platforms", "--json"]) == 0
    gone, null = json.loads(capsys.readouterr().out)
    assert gone["platform"] == "gone"
    assert "ModuleNotFoundError" in gone["failure"]
    assert null["devices"][0]["device_id"] == "null:0"
    assert "attention.full" in null["devices"][0]["features"]


def test_a_device_that_is_absent_shows_the_reason(capsys, monkeypatch):
    monkeypatch.setattr("zif.null.platform.NullPlatform.probe", _probe_without_devices)
    _install(monkeypatch, ("null", "zif.null.plugin"))
    assert main(["platforms", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "no device: the driver is too old" in shown
    assert "tried: asked the driver" in shown


def _probe_without_devices(platform):
    from zif.contract import Probe

    return Probe((), reason="the driver is too old", steps=("asked the driver",))
