"""L4, graphs: what a device captures or compiles shows in no result, at any number of requests in a step."""

import random
from typing import Any

import pytest
import torch

from zif.contract import Device, EagerGraphs
from zif_conformance.gates import exact, hold
from zif_conformance.marks import Safety, conforms
from zif_conformance.plugin import ClaimsInTest
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.models import TinyModels, families, prompt_tokens
from zif_conformance.tiny_models.stepping import stepping

_LENGTHS = (1, 2, 3, 8, 2, 1, 8, 7, 8, 3)
_MAX_NUM_SEQS = 8


def _prove(claims: ClaimsInTest) -> None:
    """Count the claim where it is made; what follows holds for every device."""
    if claims.has("graph_capture"):
        claims.prove("graph_capture")


def _numbers(length: int, seed: int, device: Device) -> torch.Tensor:
    found = torch.randint(-1000, 1000, (length, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return found.to(device.array_device)


def _mixed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first * 3 + second.flip(0)


@conforms(level="L4", gate="G1", clause="5.4", negative=True, claims=("graph_capture",))
def test_who_claims_to_capture_does(device: Device) -> None:
    assert not isinstance(device.graphs, EagerGraphs), "graph_capture is claimed, and functions are run as they are"


@conforms(level="L4", gate="G1", clause="5.4")
def test_a_wrapped_function_keeps_its_meaning(device: Device, claims: ClaimsInTest, record_gate: GateRecorder) -> None:
    wrapped = device.graphs.wrap(_mixed)
    for seed, length in enumerate(_LENGTHS):
        first, second = _numbers(length, seed, device), _numbers(length, seed + 100, device)
        hold(record_gate, exact(wrapped(first, second).cpu(), _mixed(first, second).cpu(), f"call {seed}"))
    _prove(claims)


@conforms(level="L4", gate="G1", clause="5.4", negative=True)
@pytest.mark.parametrize("length", sorted(set(_LENGTHS)))
def test_results_and_arguments_outlive_the_next_call(
    device: Device, claims: ClaimsInTest, record_gate: GateRecorder, length: int
) -> None:
    wrapped, kept = device.graphs.wrap(_mixed), []
    for seed in range(5):
        first, second = _numbers(length, seed, device), _numbers(length, seed + 50, device)
        kept.append((first, second, wrapped(first, second)))
    for seed, (first, second, result) in enumerate(kept):
        given = _numbers(length, seed, device), _numbers(length, seed + 50, device)
        hold(record_gate, exact(first.cpu(), given[0].cpu(), "argument"), exact(second.cpu(), given[1].cpu(), "other"))
        hold(record_gate, exact(result.cpu(), _mixed(*given).cpu(), f"result of call {seed}"))
    _prove(claims)


@conforms(level="L4", gate="G1", clause="5.4", negative=True, safety=Safety.MEMORY)
def test_what_a_function_writes_goes_where_this_call_says(
    device: Device, claims: ClaimsInTest, record_gate: GateRecorder
) -> None:
    """As keys and values of a step go to slots of a cache: neither is that of the call that was captured."""

    def store(cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        cache[slots] = rows
        return rows

    wrapped, draw = device.graphs.wrap(store), random.Random(1)
    caches = [_numbers(16, seed, device) for seed in range(2)]
    wanted = [cache.cpu().clone() for cache in caches]
    for seed in range(12):
        rows, chosen = _numbers(3, seed + 9, device), draw.randrange(2)
        slots = torch.tensor(draw.sample(range(16), 3))
        wrapped(caches[chosen], rows, slots.to(device.array_device))
        wanted[chosen][slots] = rows.cpu()
        hold(record_gate, *(exact(c.cpu(), w, f"after call {seed}") for c, w in zip(caches, wanted, strict=True)))
    _prove(claims)


@conforms(level="L4", gate="G1", clause="5.4", negative=True)
def test_an_error_reaches_the_caller_and_the_next_call_works(device: Device, record_gate: GateRecorder) -> None:
    def picky(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        if len(first) == 5:
            raise ValueError("five rows")
        return _mixed(first, second)

    wrapped = device.graphs.wrap(picky)
    for length in (2, 5, 2, 5, 3):
        first, second = _numbers(length, length, device), _numbers(length, length + 1, device)
        if length == 5:
            with pytest.raises(ValueError, match="five rows"):
                wrapped(first, second)
        else:
            hold(record_gate, exact(wrapped(first, second).cpu(), _mixed(first, second).cpu(), f"{length} rows"))


@conforms(level="L4", gate="G7", clause=("10.3", "5.4"))
@pytest.mark.parametrize("family", families("dense", "window", "hybrid"))
def test_any_number_of_requests_in_a_step(
    tiny: TinyModels, claims: ClaimsInTest, record_gate: GateRecorder, family: str
) -> None:
    """Up to the largest number and down again, twice: sizes between two buckets, and those that were seen before."""
    settings: dict[str, Any] = {"max_num_seqs": _MAX_NUM_SEQS}
    with stepping(tiny.settings(tiny.folder(family), **settings)) as stepper:
        rows = [stepper.start(prompt_tokens(5 + number, number)) for number in range(_MAX_NUM_SEQS)]
        stepper.advance(*rows, num_tokens=1)
        for size in (*range(1, _MAX_NUM_SEQS + 1), *range(_MAX_NUM_SEQS - 1, 0, -1), 4, _MAX_NUM_SEQS, 1, 5):
            stepper.step([(row, 1) for row in random.Random(size).sample(rows, size)])
    for row in rows:
        assert row.fault is None, row.fault
        tiny.truth(family).hold_tokens(record_gate, row.token_ids[: row.num_prompt_tokens], row.output)
    _prove(claims)
