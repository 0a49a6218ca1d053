"""L6: ranks that never come, die, or give up: everybody hears of it within the deadline, and a new group works."""

import socket
import time
from collections.abc import Sequence
from typing import Any

import pytest

from zif.contract import Collective, CommunicatorError, CommunicatorGroup
from zif_conformance.gates import exact, hold
from zif_conformance.marks import conforms, exercises
from zif_conformance.oracle.collectives import expected, integers
from zif_conformance.ranks import work
from zif_conformance.ranks.fleet import Fleet
from zif_conformance.ranks.work import Step

DEADLINE_S = 2.0
SLACK_S = 6.0
"""What a busy machine may add to a deadline; still far from for ever."""

OPERATIONS = {
    "all_reduce": Collective.ALL_REDUCE,
    "all_gather": Collective.ALL_GATHER,
    "reduce_scatter": Collective.REDUCE_SCATTER,
    "all_to_all": Collective.ALL_TO_ALL,
    "barrier": Collective.BARRIER,
}

by_size = pytest.mark.parametrize("ranks", [2, 3], indirect=True)
by_operation = pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=exercises(claim), id=name) for name, claim in OPERATIONS.items()]
)
REDUCE = (Collective.ALL_REDUCE,)


def _step(operation: str, size: int) -> Step:
    return Step(operation, integers("float32", (size, 3), size))


def _assert_lost(answers: Sequence[Any], began_s: float) -> None:
    """Assert that all of them have raised what the contract says, in time."""
    waited_s = time.monotonic() - began_s
    for answer in answers:
        assert isinstance(answer, CommunicatorError), repr(answer)
        assert str(answer), "the error says nothing"
    assert waited_s < DEADLINE_S + SLACK_S, f"{waited_s:.1f} s for a deadline of {DEADLINE_S} s"


def _assert_serves(ranks: Fleet, record: Any, members: Sequence[int] = ()) -> None:
    """Assert that a new group of these ranks does its work."""
    chosen = tuple(members) or tuple(range(ranks.size))
    step = _step("all_reduce", len(chosen))
    answers = ranks.run(ranks.joined(chosen), [step], chosen)
    for rank, (wanted, got) in enumerate(zip(expected(step), answers, strict=True)):
        assert not isinstance(got, BaseException), f"rank {rank}: {got!r}"
        assert wanted is not None
        hold(record, exact(got[0], wanted, f"after it, rank {rank}"))


@conforms(level="L6", gate="G1", clause=("11.1", "11.2"), negative=True)
@by_size
@by_operation
def test_a_rank_that_never_comes(ranks: Fleet, operation: str, record_gate: Any) -> None:
    survivors = tuple(range(ranks.size - 1))
    name = ranks.joined(deadline_s=DEADLINE_S)
    began_s = time.monotonic()
    _assert_lost(ranks.run(name, [_step(operation, ranks.size)], survivors), began_s)
    again_s = time.monotonic()
    _assert_lost(ranks.run(name, [_step(operation, ranks.size)], survivors), again_s)
    assert time.monotonic() - again_s < DEADLINE_S, "a group that is lost waits for its deadline once more"
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause=("11.1", "11.2"), negative=True, claims=REDUCE, deadline_s=120)
@by_size
@by_operation
def test_a_rank_that_dies(ranks: Fleet, operation: str, record_gate: Any) -> None:
    """Its process ends while the others wait for it. They go on without it, and with one that takes its place."""
    survivors = tuple(range(ranks.size - 1))
    name = ranks.joined(deadline_s=DEADLINE_S)
    waiting = ranks.begin(work.take_part, [(name, [_step(operation, ranks.size)])] * len(survivors), survivors)
    began_s = time.monotonic()
    ranks.ask(work.die, [()], (ranks.size - 1,))
    _assert_lost(ranks.answers(waiting), began_s)
    if len(survivors) > 1:
        _assert_serves(ranks, record_gate, survivors)
    ranks.revive()
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause=("11.1", "11.2"), negative=True, claims=REDUCE)
@by_size
@pytest.mark.parametrize("times", [1, 3])
def test_a_rank_that_aborts(ranks: Fleet, times: int, record_gate: Any) -> None:
    name = ranks.joined(deadline_s=DEADLINE_S)
    assert ranks.ask(work.leave, [(name, "abort", times)], (0,)) == [None]
    began_s = time.monotonic()
    _assert_lost(ranks.run(name, [_step("all_reduce", ranks.size)]), began_s)
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause="11.2", negative=True, claims=REDUCE)
@by_size
@pytest.mark.parametrize("times", [1, 3])
def test_a_group_that_is_closed(ranks: Fleet, times: int, record_gate: Any) -> None:
    name = ranks.joined(deadline_s=DEADLINE_S)
    assert ranks.ask(work.leave, [(name, "close", times)] * ranks.size) == [None] * ranks.size
    began_s = time.monotonic()
    _assert_lost(ranks.run(name, [_step("all_reduce", ranks.size)]), began_s)
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause="11.1", negative=True, claims=REDUCE)
@by_size
def test_who_leaves_after_its_part_takes_nothing_along(ranks: Fleet, record_gate: Any) -> None:
    """The first rank closes as soon as it has its result; the others have theirs."""
    for _ in range(3):
        name, step = ranks.joined(deadline_s=DEADLINE_S), _step("all_reduce", ranks.size)
        begun = ranks.begin(work.take_part, [(name, [step])] * ranks.size)
        answers = ranks.answers((0,))
        ranks.ask(work.leave, [(name, "close")], (0,))
        for wanted, got in zip(expected(step), [*answers, *ranks.answers(begun[1:])], strict=True):
            assert not isinstance(got, BaseException), repr(got)
            assert wanted is not None
            hold(record_gate, exact(got[0], wanted))


@conforms(level="L6", gate="G1", clause=("11.1", "11.2"), negative=True, claims=REDUCE)
@by_size
def test_a_rank_that_never_joins(ranks: Fleet, record_gate: Any) -> None:
    groups = ranks.new_group(deadline_s=DEADLINE_S)[:-1]
    began_s = time.monotonic()
    _assert_lost(ranks.ask(work.join, [(group,) for group in groups], tuple(range(len(groups)))), began_s)
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause=("11.1", "11.2"), negative=True, claims=REDUCE)
@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("place", ["", "nowhere", "ftp://127.0.0.1:1", "tcp://127.0.0.1"])
def test_a_meeting_place_that_is_none(ranks: Fleet, place: str, record_gate: Any) -> None:
    groups = [CommunicatorGroup("lost", rank, 2, place, DEADLINE_S) for rank in range(2)]
    began_s = time.monotonic()
    _assert_lost(ranks.ask(work.join, [(group,) for group in groups]), began_s)
    _assert_serves(ranks, record_gate)


@conforms(level="L6", gate="G1", clause="11.1", claims=REDUCE)
@by_size
def test_ranks_meet_over_the_network(ranks: Fleet, record_gate: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    groups = [CommunicatorGroup("network", rank, ranks.size, place, 15.0) for rank in range(ranks.size)]
    assert ranks.ask(work.join, [(group,) for group in groups]) == [None] * ranks.size
    step = _step("all_reduce", ranks.size)
    for wanted, got in zip(expected(step), ranks.run("network", [step]), strict=True):
        assert not isinstance(got, BaseException), repr(got)
        assert wanted is not None
        hold(record_gate, exact(got[0], wanted))
    ranks.ask(work.leave, [("network", "close")] * ranks.size)
