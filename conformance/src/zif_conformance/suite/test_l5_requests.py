"""L5, requests: a bad request is refused, a failing one ends alone, and its neighbours get the same answer as ever."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zif import LLM, SamplingParams
from zif.contract import Feature
from zif.errors import RequestError
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import SPOILT_ID, VOCAB_SIZE, spoil_token, write_checkpoint
from zif_conformance.tiny_models.models import (
    TinyModels,
    answer,
    families,
    greedy,
    hold_answers,
    prompt_tokens,
)
from zif_conformance.tiny_models.truth import Truth

_FULL = (Feature.ATTENTION_FULL,)

_BAD_PROMPTS: dict[str, list[Any]] = {
    "empty": [],
    "negative token": [5, -1],
    "token beyond the vocabulary": [5, VOCAB_SIZE],
    "token beyond 32 bits": [5, 2**33],
    "token that is text": [5, "6"],
    "token that is a fraction": [5, 6.5],
}
# Tokens more than the context has.
_LONG_PROMPTS = {"as long as the context": 0, "longer than the context": 1}
_BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "no sample": {"n": 0},
    "temperature below zero": {"temperature": -0.5},
    "temperature that is no number": {"temperature": float("nan")},
    "top_p of nothing": {"top_p": 0.0},
    "no token": {"max_tokens": 0},
    "more tokens at least than at most": {"min_tokens": 9, "max_tokens": 8},
    "empty stop string": {"stop": [""]},
    "seed beyond 64 bits": {"seed": 2**63},
    "nothing allowed": {"allowed_token_ids": []},
}
_FOREIGN_TOKENS: dict[str, dict[str, Any]] = {
    "allowed": {"allowed_token_ids": [VOCAB_SIZE]},
    "biased": {"logit_bias": {VOCAB_SIZE: 1.0}},
}


@pytest.fixture(scope="module")
def llm(tiny: TinyModels) -> Iterator[LLM]:
    """The dense model."""
    with tiny.open("dense") as opened:
        yield opened


def _bad_prompt(tiny: TinyModels, name: str) -> list[Any]:
    return _BAD_PROMPTS[name] if name in _BAD_PROMPTS else [5] * (tiny.max_model_len + _LONG_PROMPTS[name])


def _drain(llm: LLM) -> None:
    """Let the engine give back what earlier answers held."""
    while llm.engine.has_work():
        llm.engine.step()


def _whole(tiny: TinyModels, record: GateRecorder, llm: LLM, number: int) -> None:
    """Assert that the engine still answers rightly."""
    hold_answers(tiny.truth("dense"), record, answer(llm, [prompt_tokens(19, number)], greedy(6)), 6)


@conforms(level="L5", gate="G7", clause="10.4", claims=_FULL, negative=True)
@pytest.mark.parametrize("name", [*_BAD_PROMPTS, *_LONG_PROMPTS])
def test_a_bad_prompt_is_refused(tiny: TinyModels, llm: LLM, record_gate: GateRecorder, name: str) -> None:
    good = {"prompt_token_ids": prompt_tokens(19, 20)}
    bad = {"prompt_token_ids": _bad_prompt(tiny, name)}
    _drain(llm)
    with pytest.raises(RequestError):
        llm.generate([good, bad], greedy(6), use_tqdm=False)
    assert not llm.engine.has_work()
    _whole(tiny, record_gate, llm, 20)


@conforms(level="L5", gate="G7", clause="10.4", claims=_FULL, negative=True)
@pytest.mark.parametrize("name", ["negative token", "longer than the context"])
def test_a_bad_prompt_among_good_ones_errs_in_its_place(
    tiny: TinyModels, llm: LLM, record_gate: GateRecorder, name: str
) -> None:
    prompts = [prompt_tokens(19, 21), _bad_prompt(tiny, name), prompt_tokens(7, 22)]
    outputs = list(llm.generate(iter([{"prompt_token_ids": tokens} for tokens in prompts]), greedy(6)))
    assert outputs[1].outputs[0].finish_reason == "error"
    assert outputs[1].outputs[0].error
    hold_answers(tiny.truth("dense"), record_gate, [outputs[0], outputs[2]], 6)


@conforms(level="L5", clause="10.4", claims=_FULL, negative=True)
@pytest.mark.parametrize("name", _BAD_OPTIONS)
def test_bad_options_are_refused(llm: LLM, name: str) -> None:
    _drain(llm)
    with pytest.raises(RequestError):
        answer(llm, [prompt_tokens(5)], SamplingParams(**_BAD_OPTIONS[name]))
    assert not llm.engine.has_work()


@conforms(level="L5", gate="G7", clause="10.4", claims=_FULL, negative=True)
@pytest.mark.parametrize("name", _FOREIGN_TOKENS)
def test_options_that_name_foreign_tokens_are_refused(
    tiny: TinyModels, llm: LLM, record_gate: GateRecorder, name: str
) -> None:
    with pytest.raises(RequestError):
        answer(llm, [prompt_tokens(5)], greedy(4, **_FOREIGN_TOKENS[name]))
    _whole(tiny, record_gate, llm, 23)


@conforms(level="L5", clause="10.2", claims=_FULL, negative=True)
def test_an_answer_ends_where_the_context_does(tiny: TinyModels, llm: LLM) -> None:
    (output,) = answer(llm, [prompt_tokens(tiny.max_model_len - 3, 24)], greedy(50))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 3


@conforms(level="L5", clause="10.2", claims=_FULL, negative=True)
@pytest.mark.parametrize("banned", [1, 3])
def test_a_forbidden_token_is_never_chosen(llm: LLM, banned: int) -> None:
    free = answer(llm, [prompt_tokens(15, 25)], greedy(8))[0].outputs[0].token_ids
    biased = dict.fromkeys(free[:banned], -100.0)
    bound = answer(llm, [prompt_tokens(15, 25)], greedy(8, logit_bias=biased))[0].outputs[0].token_ids
    assert not set(bound) & set(biased)


@conforms(level="L5", gate="G7", clause=("8.6", "10.4", "10.6"), negative=True)
@pytest.mark.parametrize("family", families("dense", "window", "hybrid"))
def test_not_a_number_stays_in_its_request(
    tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, family: str
) -> None:
    folder = write_checkpoint(family, tmp_path, tiny.capabilities)
    spoil_token(folder, SPOILT_ID, tiny.dtype)
    clean = [[token for token in prompt_tokens(24, n) if token != SPOILT_ID] for n in range(3)]
    spoilt = [*clean[1][:9], SPOILT_ID, *clean[1][9:]]
    with LLM(**tiny.settings(folder, enable_prefix_caching=False)) as opened:
        first, failed, third = answer(opened, [clean[0], spoilt, clean[2]], greedy(6))
        # Blocks that held it are used again.
        after = [output for _ in range(4) for output in answer(opened, clean, greedy(6))]
    assert failed.outputs[0].finish_reason == "error", failed.outputs[0]
    assert failed.outputs[0].error
    hold_answers(Truth.of(folder, tiny.dtype), record_gate, [first, third, *after], 6)
