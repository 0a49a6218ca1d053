"""A platform that says that it computes nothing: all but its package is unsupported, and no profile is reached."""

from zif.null.platform import NullPlatform
from zif_conformance.bundle import judge
from zif_conformance.claims import Claims, capabilities_json
from zif_conformance.marks import LEVELS

_IDLE = """
    import dataclasses

    def probe(self):
        (device,) = NullPlatform.probe(self).devices
        claims = dataclasses.replace(device.capabilities, notes=("computes nothing: for tests",))
        return Probe((dataclasses.replace(device, capabilities=claims),))

    ToyPlatform.probe = probe
"""
_TESTS = """
    @conforms(level="L1", clause="6.1")
    def test_of_any_device(): pass

    @conforms(level="L1", clause="6.1", claims=("dtype:float32",))
    def test_of_a_claim(): pass
"""


def _null_claims():
    return capabilities_json(NullPlatform().probe().devices[0].capabilities)


def test_its_tests_are_unsupported_beyond_the_package(lab):
    lab.plugin(_IDLE)
    lab.tests(_TESTS)
    lab.tests("@conforms(level='L0', clause='1.1')\ndef test_of_the_package(): pass", "test_l0_small.py")
    outcomes = lab.run()
    assert {name: outcome.verdict.value for name, outcome in outcomes.items()} == {
        "L0.small.of_the_package": "passed",
        "L1.small.of_any_device": "unsupported",
        "L1.small.of_a_claim": "unsupported",
    }
    assert outcomes["L1.small.of_any_device"].missing == ("computing",)


def test_a_platform_without_that_note_has_to_pass_them(lab):
    lab.plugin()
    lab.tests(_TESTS)
    assert {outcome.verdict.value for outcome in lab.run(levels=("L1",)).values()} == {"passed"}


def test_the_null_platform_is_one_and_no_profile_takes_it():
    declared = _null_claims()
    assert not Claims.from_json(declared).has("computing")
    claims = judge.judge_claims(declared, [], LEVELS)
    assert judge.claim_errors(claims) == ["the platform says that it computes nothing, so there is nothing to prove"]


def test_to_be_idle_excuses_nothing_in_the_package():
    test = {"id": "L0.package.fork", "outcome": "unsupported", "missing": ["fork_safe"]}
    (error,) = judge.false_excuses(_null_claims(), [test])
    assert "fork_safe" in error


def test_levels_without_arithmetic_pass_no_judgement_on_it():
    claims = judge.judge_claims(_null_claims(), [], ("L0",))
    assert [claim["outcome"] for claim in claims] == ["outside"]
