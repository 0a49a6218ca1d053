"""L6: collectives between ranks in processes of their own: values, order, shapes, and ranks that come out of step."""

import random
from typing import Any

import pytest
import torch

from zif.contract import Collective
from zif_conformance.gates import exact, hold, ratio
from zif_conformance.marks import Safety, cases, conforms, exercises
from zif_conformance.oracle.collectives import expected, integers, normals, program
from zif_conformance.ranks.fleet import Fleet
from zif_conformance.ranks.work import Step, take_part

DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8")
FLOATS = ("float32", "bfloat16", "float16")
SIZES = (2, 3)

OPERATIONS = {
    "all_reduce": (Collective.ALL_REDUCE,),
    "all_gather": (Collective.ALL_GATHER,),
    "reduce_scatter": (Collective.REDUCE_SCATTER,),
    "all_to_all": (Collective.ALL_TO_ALL,),
    "broadcast": (Collective.BROADCAST,),
    "shift": (Collective.SEND_RECV,),
}
ALL = tuple(Collective)

by_size = pytest.mark.parametrize("ranks", SIZES, indirect=True)
by_dtype = pytest.mark.parametrize("dtype", cases("collective_dtype", *DTYPES))
by_operation = pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=exercises(*claims), id=name) for name, claims in OPERATIONS.items()]
)


def _hold_exact(record: Any, step: Step, results: list[Any]) -> None:
    """Assert that every rank has what the step means."""
    for rank, (wanted, got) in enumerate(zip(expected(step), results, strict=True)):
        assert not isinstance(got, BaseException), f"rank {rank}: {got!r}"
        if wanted is not None:
            hold(record, exact(got[0], wanted, f"{step.operation}, rank {rank}"))


@conforms(level="L6", gate="G1", clause=("11.1", "11.3"), safety=Safety.MEMORY)
@by_size
@by_dtype
@by_operation
def test_numbers_that_every_dtype_holds(ranks: Fleet, dtype: str, operation: str, record_gate: Any) -> None:
    size = ranks.size
    name = ranks.joined()
    for shape in ((size,), (2 * size, 3), (size, 5, 7), (5 * size, 129)):
        step = Step(operation, integers(dtype, shape, size), peer=size - 1)
        _hold_exact(record_gate, step, ranks.run(name, [step]))


@conforms(level="L6", gate="G1", clause="11.1", negative=True)
@by_size
@pytest.mark.parametrize("dtype", cases("collective_dtype", "float32", "int32"))
@by_operation
def test_arrays_without_elements(ranks: Fleet, dtype: str, operation: str, record_gate: Any) -> None:
    size = ranks.size
    name = ranks.joined()
    steps = [Step(operation, integers(dtype, shape, size)) for shape in ((0,), (0, 4), (size, 0))]
    steps.append(Step(operation, integers(dtype, (size,), size)))
    results = ranks.run(name, steps)
    for index, step in enumerate(steps):
        rows = [result if isinstance(result, BaseException) else result[index : index + 1] for result in results]
        _hold_exact(record_gate, step, rows)


@conforms(level="L6", gate="G3", clause="11.1", claims=(Collective.ALL_REDUCE, Collective.REDUCE_SCATTER))
@by_size
@pytest.mark.parametrize("dtype", cases("collective_dtype", *FLOATS))
@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter"])
def test_sums_are_as_good_as_their_dtype(ranks: Fleet, dtype: str, operation: str, record_gate: Any) -> None:
    size = ranks.size
    step = Step(operation, normals(dtype, (16 * size, 33), size))
    results = ranks.run(ranks.joined(), [step])
    wide = expected(Step(operation, tuple(array.double() for array in step.arrays)))
    one_by_one = expected(step)
    for got, wanted, declared in zip(results, wide, one_by_one, strict=True):
        assert not isinstance(got, BaseException), repr(got)
        assert wanted is not None
        assert declared is not None
        hold(record_gate, ratio(got[0], wanted, [declared], operation))


@conforms(level="L6", gate="G1", clause="11.1", claims=(Collective.ALL_REDUCE,))
@by_size
@pytest.mark.parametrize("numel", [1, 4095, 1 << 20])
def test_large_and_odd_sizes(ranks: Fleet, numel: int, record_gate: Any) -> None:
    size = ranks.size
    step = Step("all_reduce", integers("float32", (numel,), size))
    _hold_exact(record_gate, step, ranks.run(ranks.joined(), [step]))


@conforms(level="L6", gate="G6", clause="11.1", claims=(Collective.ALL_REDUCE,), negative=True)
@by_size
def test_special_values_are_not_swallowed(ranks: Fleet, record_gate: Any) -> None:
    size = ranks.size
    arrays = [torch.ones(6) for _ in range(size)]
    arrays[0][:4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    arrays[1][1] = float("-inf")
    for got in ranks.run(ranks.joined(), [Step("all_reduce", tuple(arrays))]):
        assert not isinstance(got, BaseException), repr(got)
        total = got[0]
        assert total[:2].isnan().all(), total
        assert total[2] == float("-inf"), total
        record_gate("G6", float((total[3:] != torch.stack(arrays).sum(0)[3:]).sum()), 0.0, "ordinary neighbours")
        assert torch.equal(total[4:], torch.full((2,), float(size)))


@conforms(level="L6", gate="G1", clause="11.1", claims=(Collective.BROADCAST,))
@by_size
def test_every_rank_can_be_the_source(ranks: Fleet, record_gate: Any) -> None:
    size = ranks.size
    name = ranks.joined()
    for source in range(size):
        step = Step("broadcast", integers("float32", (3, 4), size), peer=source)
        _hold_exact(record_gate, step, ranks.run(name, [step]))


@conforms(level="L6", gate="G1", clause="11.3", claims=ALL, negative=True)
@by_size
@by_operation
def test_strided_arguments(ranks: Fleet, operation: str, record_gate: Any) -> None:
    """The argument is every second column of a wider array."""
    size = ranks.size
    wide = integers("float32", (2 * size, 8), size)
    step = Step(operation, tuple(array[:, ::2] for array in wide))
    _hold_exact(record_gate, step, ranks.run(ranks.joined(), [step]))


@conforms(level="L6", clause="11.1", negative=True, claims=(Collective.BARRIER, Collective.ALL_REDUCE), gate="G1")
@by_size
def test_ranks_that_come_out_of_step(ranks: Fleet, record_gate: Any) -> None:
    """Each rank in turn is the last one to come."""
    size = ranks.size
    name = ranks.joined()
    for last in range(size):
        step = Step("all_reduce", integers("float32", (8,), size))
        calls = [
            (name, [Step("barrier", step.arrays), Step(step.operation, step.arrays, late_s=0.2 * (rank == last))])
            for rank in range(size)
        ]
        results = ranks.ask(take_part, calls)
        _hold_exact(record_gate, step, [r if isinstance(r, BaseException) else r[1:] for r in results])


@conforms(level="L6", gate="G1", clause="11.1", claims=ALL, deadline_s=120)
@by_size
@pytest.mark.parametrize("seed", range(4))
def test_random_programs(ranks: Fleet, seed: int, record_gate: Any) -> None:
    """Forty collectives of all kinds in a row: none may take what belongs to another."""
    size = ranks.size
    steps = program(random.Random(seed), size, 40)
    results = ranks.run(ranks.joined(), steps)
    for index, step in enumerate(steps):
        rows = [result if isinstance(result, BaseException) else result[index : index + 1] for result in results]
        _hold_exact(record_gate, step, rows)


@conforms(level="L6", gate="G1", clause="11.1", claims=(Collective.ALL_REDUCE,), negative=True)
@by_size
def test_groups_do_not_hear_each_other(ranks: Fleet, record_gate: Any) -> None:
    """Two groups of the same ranks, in opposite order, used in turns."""
    size = ranks.size
    first, second = ranks.joined(), ranks.joined(tuple(reversed(range(size))))
    for turn in range(3):
        for name, members in ((first, range(size)), (second, reversed(range(size)))):
            step = Step("all_reduce", integers("float32", (turn + 2,), size))
            _hold_exact(record_gate, step, ranks.run(name, [step], tuple(members)))


@conforms(level="L6", gate="G1", clause="11.1", claims=(Collective.ALL_GATHER,))
@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_some_of_the_ranks_are_a_group(ranks: Fleet, record_gate: Any) -> None:
    """The last rank and the first, in this order."""
    size = ranks.size
    members = (size - 1, 0)
    step = Step("all_gather", integers("float32", (2, 2), 2))
    _hold_exact(record_gate, step, ranks.run(ranks.joined(members), [step], members))


@conforms(level="L6", gate="G1", clause="11.1", claims=(Collective.SEND_RECV,), negative=True)
@by_size
def test_messages_between_two_keep_their_order(ranks: Fleet, record_gate: Any) -> None:
    size = ranks.size
    name = ranks.joined()
    arrays = [integers("float32", (n + 1,), size) for n in range(8)]
    programs = [
        (name, [Step("send", array, peer=1) for array in arrays]),
        (name, [Step("receive", array, peer=0) for array in arrays]),
    ]
    sent, received = ranks.ask(take_part, programs, (0, 1))
    assert not isinstance(sent, BaseException), repr(sent)
    assert not isinstance(received, BaseException), repr(received)
    for array, got in zip(arrays, received, strict=True):
        hold(record_gate, exact(got, array[0], "message"))


@conforms(
    level="L6", clause="11.1", negative=True, claims=(Collective.REDUCE_SCATTER, Collective.ALL_TO_ALL), gate="G1"
)
@by_size
@by_dtype
@pytest.mark.parametrize("operation", ["reduce_scatter", "all_to_all"])
def test_an_axis_that_cannot_be_cut_is_refused_by_all(
    ranks: Fleet, dtype: str, operation: str, record_gate: Any
) -> None:
    """Refused before anything is sent: the group goes on."""
    size = ranks.size
    name = ranks.joined()
    wrong = Step(operation, integers(dtype, (size + 1, 2), size))
    for answer in ranks.run(name, [wrong]):
        assert isinstance(answer, ValueError), repr(answer)
    right = Step(operation, integers(dtype, (2 * size, 2), size))
    _hold_exact(record_gate, right, ranks.run(name, [right]))


@conforms(level="L6", clause="11.1", negative=True, claims=(Collective.BROADCAST,))
@by_size
@pytest.mark.parametrize("offset", [-1, 0])
def test_a_source_that_does_not_exist_is_refused(ranks: Fleet, offset: int) -> None:
    size = ranks.size
    source = -1 if offset else size
    wrong = Step("broadcast", integers("float32", (2,), size), peer=source)
    for answer in ranks.run(ranks.joined(), [wrong]):
        assert isinstance(answer, Exception), f"source {source} of {size} ranks gave {answer!r}"
