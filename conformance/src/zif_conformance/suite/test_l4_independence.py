"""L4, independence: seeds, batches and faults. One request is none of another's business."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

from zif.contract import Feature, SamplingParams
from zif.errors import ModelError
from zif_conformance.gates.result import GateResult, hold
from zif_conformance.marks import Safety, conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import SPOILT_ID, VOCAB_SIZE, spoil_token, write_checkpoint
from zif_conformance.tiny_models.models import TinyModels, families, prompt_tokens
from zif_conformance.tiny_models.stepping import Stepper, stepping
from zif_conformance.tiny_models.truth import Truth

_FULL = (Feature.ATTENTION_FULL,)
_KINDS = ("dense", "window", "hybrid")
# What core's own decoder runs: products of Transformers' modules are the array library's, whatever a platform claims.
_DECODED = ("dense", "window", "softcap", "experts", "sinks")
# So hot that the random number decides and rounding of logits does not.
_HOT: dict[str, Any] = {"temperature": 100.0}


def _stepper(tiny: TinyModels, family: str = "dense", **changes: Any) -> contextlib.AbstractContextManager[Stepper]:
    return stepping(tiny.settings(tiny.folder(family), **changes))


def _drawn(stepper: Stepper, seed: int, num_beside: int = 0, chunk: int | None = None) -> list[int]:
    """Return ten tokens drawn with the seed, beside other requests that draw with theirs."""
    beside = [stepper.start(prompt_tokens(4 + n, n), SamplingParams(**_HOT), seed=99 + n) for n in range(num_beside)]
    row = stepper.start(prompt_tokens(21, 20), SamplingParams(**_HOT), seed=seed)
    stepper.advance(*beside, row, num_tokens=10, chunk=chunk)
    for each in (*beside, row):
        stepper.release(each)
    return row.output


@conforms(level="L4", clause=("10.3", "10.5"), claims=_FULL)
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -(2**63)])
def test_a_seed_draws_the_same_wherever_it_runs(tiny: TinyModels, seed: int) -> None:
    with _stepper(tiny) as stepper:
        alone = _drawn(stepper, seed)
        assert _drawn(stepper, seed, num_beside=3) == alone
        assert _drawn(stepper, seed, num_beside=1, chunk=5) == alone


@conforms(level="L4", clause="10.5", claims=_FULL)
def test_a_seed_goes_on_after_a_resumption(tiny: TinyModels) -> None:
    with _stepper(tiny) as stepper:
        alone = _drawn(stepper, 7)
        tokens = [*prompt_tokens(21, 20), *alone[:4]]
        resumed = stepper.start(tokens, SamplingParams(**_HOT), seed=7, num_prompt_tokens=21)
        stepper.advance(resumed, num_tokens=6)
        assert resumed.output == alone


@conforms(level="L4", clause="10.5", claims=_FULL, negative=True)
def test_other_seeds_draw_otherwise(tiny: TinyModels) -> None:
    with _stepper(tiny) as stepper:
        drawn = {tuple(_drawn(stepper, seed)) for seed in (0, 1, 2, -1, 2**62)}
    assert len(drawn) == 5


@conforms(level="L4", clause="10.5", claims=_FULL, negative=True)
def test_equal_prompts_with_other_seeds_do_not_agree(tiny: TinyModels) -> None:
    with _stepper(tiny) as stepper:
        rows = [stepper.start(prompt_tokens(9, 21), SamplingParams(**_HOT), seed=seed) for seed in range(4)]
        stepper.advance(*rows, num_tokens=8)
    assert len({tuple(row.output) for row in rows}) == 4


@conforms(level="L4", gate="G1", clause=("10.3", "10.13"), claims=("batch_invariant",))
@pytest.mark.parametrize("num_beside", [1, 2, 7])
@pytest.mark.parametrize("family", families(*_DECODED))
def test_not_a_bit_depends_on_the_batch(
    tiny: TinyModels, record_gate: GateRecorder, family: str, num_beside: int
) -> None:
    options = SamplingParams(temperature=0.0, logprobs=VOCAB_SIZE)
    with _stepper(tiny, family, batch_invariant=True) as stepper:
        assert stepper.device.plan.batch_invariant, "the plan does not carry what the workload asked for"
        alone = _logprobs(stepper, options, 0)
        together = _logprobs(stepper, options, num_beside)
        in_chunks = _logprobs(stepper, options, num_beside, chunk=5)
    for others, how in ((together, "beside others"), (in_chunks, "beside others, the prompt in chunks")):
        differing = sum(a != b for a, b in zip(alone, others, strict=True))
        hold(record_gate, GateResult("G1", differing, 0.0, f"log-probabilities that differ of {len(alone)}, {how}"))


def _logprobs(stepper: Stepper, options: SamplingParams, num_beside: int, chunk: int = 64) -> list[tuple[int, float]]:
    beside = [stepper.start(prompt_tokens(3 + 5 * n, 30 + n), options) for n in range(num_beside)]
    row = stepper.start(prompt_tokens(21, 22), options)
    found: list[tuple[int, float]] = []
    while len(row.output) < 4:
        result = stepper.step([(each, min(chunk, each.num_known - each.num_computed)) for each in (*beside, row)])
        for entry in result.logprobs.get(row.request_id, ()):
            found += sorted(zip(entry.token_ids, entry.logprobs, strict=True))
    for each in (*beside, row):
        stepper.release(each)
    return found


@conforms(level="L4", gate="G7", clause=("8.6", "10.4"), negative=True)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("family", families(*_KINDS))
def test_a_fault_stays_in_its_request(
    tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, family: str, place: int
) -> None:
    folder = write_checkpoint(family, tmp_path, tiny.capabilities)
    spoil_token(folder, SPOILT_ID, tiny.dtype)
    prompts = [[token for token in prompt_tokens(19, n) if token != SPOILT_ID] for n in range(3)]
    prompts[place][8] = SPOILT_ID
    truth = Truth.of(folder, tiny.dtype)
    with stepping(tiny.settings(folder)) as stepper:
        rows = [stepper.start(tokens) for tokens in prompts]
        result = stepper.step([(row, row.num_known) for row in rows])
        assert list(result.faults) == [rows[place].request_id]
        assert result.faults[rows[place].request_id]
        failed = rows.pop(place)
        stepper.release(failed)
        rows.append(stepper.start([token for token in prompt_tokens(19, 9) if token != SPOILT_ID]))
        stepper.advance(*rows, num_tokens=5)
    for row in rows:
        truth.hold_tokens(record_gate, row.token_ids[: row.num_prompt_tokens], row.output)


@conforms(level="L4", gate="G7", clause="10.4", claims=_FULL, negative=True)
@pytest.mark.parametrize("damage", ["cut", "no header"])
def test_broken_weights_are_refused(tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, damage: str) -> None:
    folder = write_checkpoint("dense", tmp_path, tiny.capabilities)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-64] if damage == "cut" else b"\xff" * 8 + whole[8:])
    with pytest.raises(ModelError), stepping(tiny.settings(folder)):
        pass
    path.write_bytes(whole)
    with stepping(tiny.settings(folder)) as stepper:
        row = stepper.start(prompt_tokens(12, 23))
        stepper.advance(row, num_tokens=4)
    tiny.truth("dense").hold_tokens(record_gate, row.token_ids[:12], row.output)


@conforms(level="L4", clause=("5.1", "6.3"), claims=_FULL, negative=True, safety=Safety.MEMORY)
@pytest.mark.parametrize("num_closes", [1, 2])
def test_a_closed_runner_holds_no_memory(tiny: TinyModels, num_closes: int) -> None:
    with _stepper(tiny) as stepper:
        row = stepper.start(prompt_tokens(12, 24))
        stepper.advance(row, num_tokens=2)
        for _ in range(num_closes):
            stepper.runner.close()
        assert stepper.device.allocator.stats().allocated_bytes == 0
