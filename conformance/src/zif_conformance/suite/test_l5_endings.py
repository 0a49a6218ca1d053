"""L5, endings: an answer ends where its request says, at the token and the character, and takes no other with it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from zif import LLM, CompletionOutput, SamplingParams
from zif.contract import Feature
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import EOS_ID, PRINTABLE
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens

_FULL = (Feature.ATTENTION_FULL,)
_TO_THE_END = {EOS_ID: 100.0}


@pytest.fixture(scope="module")
def llm(tiny: TinyModels) -> Iterator[LLM]:
    """The dense model."""
    with tiny.open("dense") as opened:
        yield opened


def _sample(llm: LLM, number: int, sampling: SamplingParams) -> CompletionOutput:
    return answer(llm, [prompt_tokens(13, number)], sampling)[0].outputs[0]


def _text(llm: LLM, number: int) -> str:
    return _sample(llm, number, greedy(30, allowed_token_ids=PRINTABLE)).text


@conforms(level="L5", clause="10.2", claims=_FULL)
@pytest.mark.parametrize("min_tokens", [0, 1, 5])
def test_the_end_of_text_ends_an_answer(llm: LLM, min_tokens: int) -> None:
    options = greedy(12, logit_bias=_TO_THE_END, ignore_eos=False, min_tokens=min_tokens)
    sample = _sample(llm, 1, options)
    assert sample.finish_reason == "stop"
    assert (sample.token_ids.index(EOS_ID), len(sample.token_ids)) == (min_tokens, min_tokens + 1)


@conforms(level="L5", clause="10.2", claims=_FULL, negative=True)
def test_the_end_of_text_is_a_token_like_others_to_who_ignores_it(llm: LLM) -> None:
    sample = _sample(llm, 1, greedy(12, logit_bias=_TO_THE_END))
    assert (sample.finish_reason, sample.token_ids, sample.text) == ("length", [EOS_ID] * 12, "")


@conforms(level="L5", clause="10.2", claims=_FULL, negative=True)
def test_a_stop_token_before_the_least_length_ends_nothing(llm: LLM) -> None:
    sample = _sample(llm, 2, greedy(12, logit_bias={7: 100.0}, stop_token_ids=[7], min_tokens=5))
    assert (sample.finish_reason, sample.stop_reason, sample.token_ids.index(7)) == ("stop", 7, 5)
    assert len(sample.token_ids) == 6


@conforms(level="L5", clause="10.2", claims=_FULL)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_may_stay_in_the_text(llm: LLM, length: int) -> None:
    whole = _text(llm, 3)
    stop = whole[4 : 4 + length]
    options = greedy(30, allowed_token_ids=PRINTABLE, stop=[stop], include_stop_str_in_output=True)
    sample = _sample(llm, 3, options)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == whole[: whole.index(stop) + length]


@conforms(level="L5", clause="10.2", claims=_FULL)
def test_of_several_stop_strings_the_first_in_the_text_ends_it(llm: LLM) -> None:
    whole = _text(llm, 4)
    stops = [whole[9:12], whole[5:8], whole[14:17]]
    sample = _sample(llm, 4, greedy(30, allowed_token_ids=PRINTABLE, stop=stops))
    assert (sample.finish_reason, sample.text) == ("stop", whole[: min(whole.index(stop) for stop in stops)])


@conforms(level="L5", gate="G7", clause="10.2", claims=_FULL, negative=True)
def test_a_stop_string_that_never_comes_changes_nothing(tiny: TinyModels, llm: LLM, record_gate: GateRecorder) -> None:
    outputs = answer(llm, [prompt_tokens(13, 5)], greedy(20, stop=["<never|seen>"]))
    hold_answers(tiny.truth("dense"), record_gate, outputs, 20)


@conforms(level="L5", clause="10.2", claims=_FULL, negative=True)
def test_samples_of_one_prompt_end_each_on_its_own(llm: LLM) -> None:
    options = SamplingParams(n=4, temperature=1.5, seed=5, max_tokens=24, allowed_token_ids=PRINTABLE)
    (free,) = answer(llm, [prompt_tokens(13, 6)], options)
    stop = free.outputs[2].text[6:8]
    (bound,) = answer(llm, [prompt_tokens(13, 6)], replace(options, stop=stop))
    for before, after in zip(free.outputs, bound.outputs, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert (after.finish_reason == "stop") == (stop in before.text)


@conforms(level="L5", gate="G7", clause=("10.6", "10.7"), claims=_FULL, negative=True)
@pytest.mark.parametrize("num_parts", [0, 1, 2, 7])
def test_a_stream_given_up_takes_no_other_with_it(
    tiny: TinyModels, llm: LLM, record_gate: GateRecorder, num_parts: int
) -> None:
    kept, given_up, queued = (
        llm.stream({"prompt_token_ids": prompt_tokens(20, number)}, greedy(12)) for number in (7, 8, 9)
    )
    next(kept)
    for _ in range(num_parts):
        next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    last = [list(stream)[-1] for stream in (kept, queued)]
    while llm.engine.has_work():
        llm.engine.step()
    llm.engine.check_integrity()
    hold_answers(tiny.truth("dense"), record_gate, last, 12)
