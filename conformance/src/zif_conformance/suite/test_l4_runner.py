"""L4, the runner: steps planned by hand. What a request gets does not depend on what else a step holds."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest
import torch

from zif.contract import Feature, HiddenRows, SamplingParams, StepResult
from zif_conformance.gates.result import Record
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.models import TinyModels, families, prompt_tokens
from zif_conformance.tiny_models.stepping import Blocks, Row, Stepper, stepping

_FULL = (Feature.ATTENTION_FULL,)
_KINDS = ("dense", "window", "hybrid")
_MAX_DRAFT = 3


@pytest.fixture(scope="module")
def dense(tiny: TinyModels) -> Iterator[Stepper]:
    """A runner with the dense model, for tests that leave no request behind."""
    with _stepper(tiny, "dense") as stepper:
        yield stepper


def _stepper(tiny: TinyModels, family: str) -> contextlib.AbstractContextManager[Stepper]:
    return stepping(tiny.settings(tiny.folder(family), speculation="ngram", max_draft_tokens=_MAX_DRAFT))


def _hold(tiny: TinyModels, record: Record, family: str, rows: Sequence[Row]) -> None:
    for row in rows:
        assert row.fault is None, row.fault
        tiny.truth(family).hold_tokens(record, row.token_ids[: row.num_prompt_tokens], row.output)


@conforms(level="L4", gate="G7", clause=("10.1", "10.2"))
@pytest.mark.parametrize("family", families())
def test_prompts_and_single_tokens_in_one_step(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    with _stepper(tiny, family) as stepper:
        early = [stepper.start(prompt_tokens(5 + number, number)) for number in range(2)]
        stepper.advance(*early, num_tokens=3)
        late = [stepper.start(prompt_tokens(2 * tiny.block_size + number, number)) for number in (2, 3)]
        # The late ones come first, and a prompt in part stands among them.
        stepper.step([(late[1], 7), (early[1], 1), (late[0], 2 * tiny.block_size + 2), (early[0], 1)])
        stepper.advance(*late, *early, num_tokens=6)
    _hold(tiny, record_gate, family, [*early, *late])


@conforms(level="L4", gate="G7", clause="10.3")
@pytest.mark.parametrize("change", ["1", "block - 1", "block", "block + 1", "2 * block + 1"])
@pytest.mark.parametrize("family", families(*_KINDS))
def test_a_prompt_cut_into_chunks(tiny: TinyModels, record_gate: GateRecorder, family: str, change: str) -> None:
    block = tiny.block_size
    chunk = {"1": 1, "block - 1": block - 1, "block": block, "block + 1": block + 1, "2 * block + 1": 2 * block + 1}
    with _stepper(tiny, family) as stepper:
        row = stepper.start(prompt_tokens(3 * block + 2, 4))
        stepper.advance(row, num_tokens=5, chunk=chunk[change])
    _hold(tiny, record_gate, family, [row])


@conforms(level="L4", gate="G7", clause="8.4")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", families(*_KINDS))
def test_blocks_in_any_order(tiny: TinyModels, record_gate: GateRecorder, family: str, seed: int) -> None:
    with _stepper(tiny, family) as stepper:
        stepper.blocks = Blocks(stepper.blocks.arena, shuffle_seed=seed)
        rows = [stepper.start(prompt_tokens(2 * tiny.block_size + number, number)) for number in range(3)]
        stepper.advance(*rows, num_tokens=tiny.block_size + 2)
    _hold(tiny, record_gate, family, rows)


@conforms(level="L4", gate="G7", clause="10.3")
@pytest.mark.parametrize("family", families(*_KINDS))
def test_a_request_resumes_elsewhere(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    with _stepper(tiny, family) as stepper:
        row = stepper.start(prompt_tokens(tiny.block_size + 3, 5))
        stepper.advance(row, num_tokens=tiny.block_size)
        stepper.release(row)
        other = stepper.start(prompt_tokens(9, 6))
        stepper.advance(other, num_tokens=2)
        resumed = stepper.start(row.token_ids, num_prompt_tokens=row.num_prompt_tokens, request_id=row.request_id)
        stepper.advance(resumed, other, num_tokens=5)
    _hold(tiny, record_gate, family, [resumed, other])


@conforms(level="L4", gate="G7", clause=("7.6", "10.6"), negative=True)
@pytest.mark.parametrize("family", families(*_KINDS))
def test_a_released_request_leaves_no_trace(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    with _stepper(tiny, family) as stepper:
        for number in range(4):
            row = stepper.start(prompt_tokens(3 * tiny.block_size - 5 * number, 7 + number), request_id=3)
            stepper.advance(row, num_tokens=4 + number)
            _hold(tiny, record_gate, family, [row])
            stepper.release(row)


@conforms(level="L4", gate="G7", clause=("10.1", "10.6"), negative=True)
def test_options_of_a_released_request_are_forgotten(
    tiny: TinyModels, dense: Stepper, record_gate: GateRecorder
) -> None:
    wild = SamplingParams(temperature=3.0, logit_bias={7: 100.0}, repetition_penalty=2.0, logprobs=2)
    first = dense.start(prompt_tokens(9, 11), wild)
    dense.advance(first, num_tokens=3)
    dense.release(first)
    second = dense.start(prompt_tokens(9, 12), request_id=first.request_id)
    result = dense.step([(second, 9)])
    assert not result.logprobs
    dense.advance(second, num_tokens=4)
    dense.release(second)
    _hold(tiny, record_gate, "dense", [second])


@conforms(level="L4", clause="10.7", claims=_FULL, negative=True)
@pytest.mark.parametrize("num_plans", [1, 3])
def test_a_plan_may_hold_nothing(dense: Stepper, num_plans: int) -> None:
    for _ in range(num_plans):
        result = dense.step()
        assert (result.sampled, result.logprobs, result.faults, result.lost) == ([], {}, {}, [])


@conforms(level="L4", gate="G7", clause="10.7", claims=_FULL, negative=True)
def test_a_plan_may_only_release_and_start(tiny: TinyModels, dense: Stepper, record_gate: GateRecorder) -> None:
    unused = dense.start(prompt_tokens(12, 13))
    assert dense.step().sampled == []
    dense.release(unused)
    assert dense.step().sampled == []
    row = dense.start(prompt_tokens(12, 14))
    assert dense.step().sampled == []
    dense.advance(row, num_tokens=4)
    dense.release(row)
    _hold(tiny, record_gate, "dense", [row])


@conforms(level="L4", clause="10.2", claims=_FULL, negative=True)
def test_what_nobody_asked_for_is_not_reported(dense: Stepper) -> None:
    row = dense.start(prompt_tokens(12, 15))
    assert dense.step([(row, 7)]).sampled == [[]]
    result = dense.step([(row, 5)])
    assert [len(sampled) for sampled in result.sampled] == [1]
    assert (result.logprobs, result.prompt_logprobs, result.faults) == ({}, {}, {})
    dense.release(row)


@conforms(level="L4", clause="10.2", claims=_FULL)
def test_logprobs_come_with_the_token_that_was_chosen(dense: Stepper) -> None:
    row = dense.start(prompt_tokens(12, 16), SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2))
    first = dense.step([(row, 7)])
    assert (len(first.prompt_logprobs[row.request_id]), first.logprobs) == (7, {})
    second = dense.step([(row, 5)])
    assert len(second.prompt_logprobs[row.request_id]) == 4
    (entry,) = second.logprobs[row.request_id]
    assert (entry.token_ids[0], entry.rank) == (row.output[0], 1)
    assert sorted(entry.logprobs[1:], reverse=True) == entry.logprobs[1:]
    dense.release(row)


@conforms(level="L4", gate="G7", clause="10.8")
@pytest.mark.parametrize("num_right", range(_MAX_DRAFT + 1))
@pytest.mark.parametrize("family", families(*_KINDS))
def test_guesses_are_accepted_while_right(
    tiny: TinyModels, record_gate: GateRecorder, family: str, num_right: int
) -> None:
    prompt = prompt_tokens(2 * tiny.block_size - 1, 17)
    with _stepper(tiny, family) as stepper:
        plain = stepper.start(prompt)
        stepper.advance(plain, num_tokens=10)
        row, beside = stepper.start(prompt), stepper.start(prompt_tokens(6, 18))
        stepper.advance(row, beside, num_tokens=1)
        guesses = [*plain.output[1 : 1 + num_right]]
        if num_right < _MAX_DRAFT:
            guesses += [(plain.output[1 + num_right] + 1) % 256] * (_MAX_DRAFT - num_right)
        # A runner that serves no drafts is never given one, and takes the same steps without.
        drafts = {row.request_id: guesses} if stepper.runner.verifies_drafts else {}
        result = stepper.step([(row, 1), (beside, 1)], drafts)
        if drafts:
            assert result.sampled[0] == plain.output[1 : 2 + num_right]
        stepper.advance(row, beside, num_tokens=5)
    _hold(tiny, record_gate, family, [plain, row, beside])


@conforms(level="L4", gate="G7", clause="10.11", negative=True)
@pytest.mark.parametrize("family", families(*_KINDS))
def test_warming_up_changes_no_token(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    reports: list[tuple[int, int]] = []
    with _stepper(tiny, family) as stepper:
        stepper.runner.warm_up(lambda done, total: reports.append((done, total)))
        rows = [stepper.start(prompt_tokens(length, length)) for length in (5, 2 * tiny.block_size + 1)]
        stepper.advance(*rows, num_tokens=5)
    assert reports == sorted(reports), "progress fell"
    assert not reports or reports[-1][0] == reports[-1][1], reports[-1]
    _hold(tiny, record_gate, family, rows)


@conforms(level="L4", gate="G7", clause="10.9")
@pytest.mark.parametrize("family", families(*_KINDS))
def test_plans_come_before_results(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    with _stepper(tiny, family) as stepper:
        depth = stepper.runner.max_steps_in_flight
        assert depth >= 1
        rows = [stepper.start(prompt_tokens(length, length)) for length in (5, tiny.block_size)]
        under_way = [stepper.submit([(row, row.num_known) for row in rows])]
        for _ in range(8):
            if len(under_way) == depth:
                stepper.apply(*under_way.pop(0))
            under_way.append(stepper.submit([(row, 1) for row in rows]))
        for plan, future in under_way:
            stepper.apply(plan, future)
    assert [len(row.output) for row in rows] == [9, 9]
    _hold(tiny, record_gate, family, rows)


@conforms(level="L4", gate="G7", clause="10.15")
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("family", families("dense", "window"))
def test_hidden_states_beside_tokens(tiny: TinyModels, record_gate: GateRecorder, family: str, chunk: int) -> None:
    tokens = prompt_tokens(2 * tiny.block_size + 3, 31)
    with _stepper(tiny, family) as stepper:
        beside = stepper.start(prompt_tokens(9, 32))
        # A runner that reports no hidden states is never asked for any.
        asked = [*HiddenRows] if stepper.runner.reports_hidden else []
        rows = [stepper.start_hidden(tokens, hidden) for hidden in asked]
        found = {row.hidden: b"" for row in rows}
        for start in range(0, len(tokens), chunk):
            num_tokens = min(chunk, len(tokens) - start)
            num_beside = beside.num_known - beside.num_computed
            result = stepper.step([*((row, num_tokens) for row in rows), (beside, num_beside)])
            _take_hidden(result, rows, found)
    _hold(tiny, record_gate, family, [beside])
    for hidden, data in found.items():
        states = torch.frombuffer(bytearray(data), dtype=torch.float32)
        states = states.view(len(tokens) if hidden is HiddenRows.ALL else 1, -1)
        tiny.truth(family).hold_hidden(record_gate, tokens, states)


def _take_hidden(result: StepResult, rows: Sequence[Row], found: dict[HiddenRows | None, bytes]) -> None:
    """Add what a step reports to `found`; only requests that asked have something."""
    assert set(result.hidden) <= {row.request_id for row in rows}
    for row in rows:
        found[row.hidden] += result.hidden.get(row.request_id, b"")
        assert not row.output
