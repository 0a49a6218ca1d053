"""Waivers hold for what they name, as long as they say, and for nothing that endangers anybody."""

import datetime

import pytest

from zif.errors import ContractError
from zif_conformance.marks import Declaration, Safety
from zif_conformance.outcomes import TestOutcome, Verdict
from zif_conformance.waivers import Waiver, apply_waivers, read_waivers

_TODAY = datetime.date(2026, 6, 1)
_FILE = """
[[waiver]]
test = "L2.ops.linear[float16]"
reason = "plugin bug"
link = "https://example.org/issues/7"
expires = 2027-01-31
"""


def _outcome(verdict, gate="G3", safety=Safety.ORDINARY, test_id="L2.a.t"):
    return TestOutcome(test_id, Declaration("L2", gate, ("9.1",), safety=safety), verdict, "why")


def _apply(outcome, test="L2.a.t", expires=_TODAY):
    padding = [_outcome(Verdict.PASSED, test_id=f"L2.p.{i}") for i in range(99)]
    waiver = Waiver(test, "plugin bug", "https://example.org/1", expires)
    known = [o.test_id for o in (outcome, *padding)]
    return apply_waivers([outcome, *padding], [waiver], known, _TODAY)


def test_a_failure_is_waived():
    waived = _apply(_outcome(Verdict.FAILED))
    assert waived.errors == ()
    assert waived.outcomes[0].verdict is Verdict.WAIVED
    assert "https://example.org/1" in waived.outcomes[0].detail


@pytest.mark.parametrize(
    ("outcome", "changes", "reason"),
    [
        (_outcome(Verdict.PASSED), {}, "passes"),
        (_outcome(Verdict.UNSUPPORTED), {}, "does not run"),
        (_outcome(Verdict.CRASHED), {}, "crash or a hang"),
        (_outcome(Verdict.FAILED, gate="G0"), {}, "cannot be waived"),
        (_outcome(Verdict.FAILED, gate="G1"), {}, "cannot be waived"),
        (_outcome(Verdict.FAILED, safety=Safety.MEMORY), {}, "cannot be waived"),
        (_outcome(Verdict.FAILED), {"expires": _TODAY - datetime.timedelta(days=1)}, "expired"),
        (_outcome(Verdict.FAILED), {"test": "L2.a.renamed"}, "no test has this id"),
    ],
)
def test_a_waiver_out_of_place_is_an_error_and_waives_nothing(outcome, changes, reason):
    waived = _apply(outcome, **changes)
    assert reason in waived.errors[0]
    assert waived.outcomes[0].verdict is outcome.verdict


def test_two_percent_at_most():
    outcomes = [_outcome(Verdict.FAILED, test_id=f"L2.a.{i}") for i in range(3)]
    outcomes += [_outcome(Verdict.PASSED, test_id=f"L2.b.{i}") for i in range(97)]
    waivers = [Waiver(f"L2.a.{i}", "plugin bug", "https://example.org/1", _TODAY) for i in range(3)]
    ids = [outcome.test_id for outcome in outcomes]
    assert apply_waivers(outcomes, waivers[:2], ids, _TODAY).errors == ()
    assert "3 of 100" in apply_waivers(outcomes, waivers, ids, _TODAY).errors[0]


def test_twice_is_an_error():
    waiver = Waiver("L2.a.t", "plugin bug", "https://example.org/1", _TODAY)
    assert "twice" in str(apply_waivers([], [waiver, waiver], ["L2.a.t"], _TODAY).errors)


def test_the_file_is_read():
    assert read_waivers(_FILE) == (
        Waiver("L2.ops.linear[float16]", "plugin bug", "https://example.org/issues/7", datetime.date(2027, 1, 31)),
    )
    assert read_waivers("") == ()


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("plugin bug", "because"),
        ("https://example.org/issues/7", "see mail"),
        ("2027-01-31", '"2027-01-31"'),
        ("2027-01-31", "2027-01-31T10:00:00"),
        ("expires = 2027-01-31", ""),
        ("[[waiver]]", "[[waiver]]\ntolerance = 1"),
        ("[[waiver]]", "[[waivers]]"),
        ("[[waiver]]", "[[waiver"),
    ],
)
def test_a_wrong_file_is_refused(was, becomes):
    with pytest.raises(ContractError, match=r"conformance_waivers\.toml"):
        read_waivers(_FILE.replace(was, becomes))
