"""L7: ranks whose device or process fails by the platform's own injector."""

import time
from pathlib import Path

import pytest

from zif.contract import Capabilities, Collective, CommunicatorError
from zif_conformance.claims import INJECTION
from zif_conformance.failing import injector_variable
from zif_conformance.marks import conforms
from zif_conformance.oracle.collectives import integers
from zif_conformance.ranks.fleet import Fleet, Silent
from zif_conformance.ranks.work import Step, take_part
from zif_conformance.subject import Subject

DEADLINE_S = 2.0
SOON_S = 10.0


@conforms(level="L7", clause=("11.1", "11.2"), negative=True, claims=(Collective.ALL_REDUCE, INJECTION), deadline_s=120)
@pytest.mark.parametrize("fault", ["stall=1@5", "die=1@2"])
def test_a_rank_stalls_or_dies(
    subject: Subject, capabilities: Capabilities, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str
) -> None:
    """The other rank hears of it in time; ranks that are started again work."""
    step = Step("all_reduce", integers("float32", (4,), 2))
    monkeypatch.setenv(injector_variable(capabilities), fault)
    with Fleet(subject.name, 2, tmp_path) as ranks:
        name = ranks.joined(deadline_s=DEADLINE_S)
        began_s = time.monotonic()
        begun = ranks.begin(take_part, [(name, [step, step])] * 2)
        (survivor,) = ranks.answers(begun[:1])
        assert isinstance(survivor, CommunicatorError), repr(survivor)
        assert time.monotonic() - began_s < SOON_S
        (other,) = ranks.answers(begun[1:])
        assert isinstance(other, CommunicatorError | Silent), repr(other)
    monkeypatch.delenv(injector_variable(capabilities))
    with Fleet(subject.name, 2, tmp_path) as ranks:
        answers = ranks.run(ranks.joined(), [step])
        assert not [answer for answer in answers if isinstance(answer, BaseException)]
