"""Platforms without a device: a run simulates one where the platform can, and every report says so."""

import os
from types import SimpleNamespace

import pytest

from zif.contract import Probe
from zif.null.platform import NullPlatform
from zif.plugins import PlatformRegistry
from zif_conformance import simulation
from zif_conformance.bundle.matrix import headline, is_simulated
from zif_conformance.claims import Claims, capabilities_json
from zif_conformance.supervisor import Run

PRESENT = NullPlatform().probe()
DECLARED = capabilities_json(PRESENT.devices[0].capabilities)
VARIABLES = (("ACME_SIMULATE", "1"),)


@pytest.fixture
def probed(monkeypatch):
    """Let the platform "acme" answer with a probe."""
    monkeypatch.delenv("ACME_SIMULATE", raising=False)

    def answer(probe):
        entry = SimpleNamespace(probe=lambda: probe)
        registry = SimpleNamespace(platforms={"acme": entry})
        monkeypatch.setattr(PlatformRegistry, "discover", classmethod(lambda _: registry))

    yield answer
    monkeypatch.delenv("ACME_SIMULATE", raising=False)


def test_missing_hardware_is_simulated_and_said(probed, capsys):
    probed(Probe((), "no driver", simulation=VARIABLES))
    simulation.simulate_missing_hardware("acme")
    assert os.environ["ACME_SIMULATE"] == "1"
    said = capsys.readouterr().err
    assert said == "no device of 'acme' here (no driver); simulating one: ACME_SIMULATE=1\n"


@pytest.mark.parametrize("probe", [Probe(PRESENT.devices, simulation=VARIABLES), Probe((), "no driver")])
def test_hardware_is_never_replaced_and_nothing_is_made_up(probed, capsys, probe):
    probed(probe)
    simulation.simulate_missing_hardware("acme")
    simulation.simulate_missing_hardware("unknown")
    assert "ACME_SIMULATE" not in os.environ
    assert capsys.readouterr().err == ""


def test_a_simulated_device_does_not_claim_hardware():
    assert Claims.from_json(DECLARED).has("hardware")
    assert not Claims.from_json({**DECLARED, "simulated": True}).has("hardware")


@pytest.mark.parametrize("simulated", [True, False])
def test_the_headline_says_it(simulated):
    device = {"architecture": "interpreter", "capabilities": {"simulated": simulated}}
    profile = {"name": "core", "version": "1.0"}
    result = {"platform": {"name": "acme"}, "status": "complete", "profile": profile, "verdict": "conformant"}
    ending = " in simulation (interpreter)" if simulated else ""
    assert headline({**result, "device": device}) == f"acme: conformant to core 1.0{ending}"
    assert is_simulated(device) == simulated


@pytest.mark.parametrize("result", [{"status": "partial"}, {"status": "complete", "profile": None, "levels": ["L3"]}])
def test_the_headline_says_it_without_a_verdict(result):
    device = {"architecture": "interpreter", "capabilities": {"simulated": True}}
    line = headline({"platform": {"name": "acme"}, "device": device, **result})
    assert line.endswith("no verdict in simulation (interpreter)")


def test_a_simulated_run_is_given_time():
    assert Run((), (), {}).patience == 1
    assert Run((), (), {"device": {"capabilities": {"simulated": False}}}).patience == 1
    assert Run((), (), {"device": {"capabilities": {"simulated": True}}}).patience > 1
