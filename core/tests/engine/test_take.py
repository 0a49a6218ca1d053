"""Answers in pieces: what `Engine.take` gives out adds up to the answer, each part once."""

from collections import defaultdict
from collections.abc import Iterator

import pytest

from support.embedded_model import MODEL
from zif import LLM, SamplingParams

PROMPT = [10, 11, 12, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, platform="null", max_model_len=128, max_num_seqs=4, kv_bytes=1 << 20) as llm:
        yield llm
        llm.engine.check_integrity()


def taken(llm, prompt, sampling):
    """Return what takes after every step add up to, by sample."""
    engine = llm.engine
    generation = engine.submit(engine.check({"prompt_token_ids": prompt}, sampling), sampling)
    samples = defaultdict(lambda: {"text": "", "token_ids": [], "logprobs": [], "ends": []})
    while not generation.finished:
        engine.step()
        for output in engine.take(generation):
            sample = samples[output.index]
            sample["text"] += output.text
            sample["token_ids"] += output.token_ids
            sample["logprobs"] += output.logprobs or []
            sample["ends"] += [output.finish_reason] if output.finish_reason else []
    assert engine.take(generation) == []
    return samples


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "max_tokens": 9},
        {"max_tokens": 40, "stop": [" well", "operator"]},
        {"max_tokens": 20, "stop": [" well"], "include_stop_str_in_output": True},
        {"max_tokens": 7, "detokenize": False},
    ],
)
def test_takes_add_up_to_the_answer(llm, options):
    sampling = SamplingParams(ignore_eos=True, seed=3, **options)
    whole = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)[0]
    samples = taken(llm, PROMPT, sampling)
    assert len(samples) == len(whole.outputs)
    for output in whole.outputs:
        sample = samples[output.index]
        assert (sample["text"], sample["token_ids"]) == (output.text, output.token_ids)
        assert sample["ends"] == [output.finish_reason]


def test_an_aborted_answer_ends_with_what_it_had(llm):
    sampling = SamplingParams(ignore_eos=True, max_tokens=50)
    engine = llm.engine
    generation = engine.submit(engine.check({"prompt_token_ids": PROMPT}, sampling), sampling)
    while not engine.take(generation):
        engine.step()
    engine.abort(generation)
    (rest,) = engine.take(generation)
    assert rest.finish_reason == "abort"
    assert engine.take(generation) == []


def test_counts_grow_with_the_work(llm):
    before = (llm.engine.counts.num_prompt_tokens, llm.engine.counts.num_generated_tokens)
    prompt = list(range(100, 140))
    sampling = SamplingParams(ignore_eos=True, max_tokens=5)
    llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    counts = llm.engine.counts
    assert (counts.num_prompt_tokens, counts.num_generated_tokens) == (before[0] + 40, before[1] + 5)
    num_cached, num_steps = counts.num_cached_tokens, counts.num_steps
    llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    assert counts.num_cached_tokens == num_cached + 32
    assert counts.num_prefix_queries >= 80
    assert counts.num_steps > num_steps
    assert counts.last_step_s > 0


def test_usage_is_of_blocks_that_requests_hold(llm):
    engine = llm.engine
    assert (engine.kv_usage(), engine.num_running, engine.num_waiting) == (0.0, 0, 0)
    sampling = SamplingParams(ignore_eos=True, max_tokens=50)
    generation = engine.submit(engine.check({"prompt_token_ids": PROMPT}, sampling), sampling)
    assert engine.num_waiting == 1
    while not engine.take(generation):
        engine.step()
    assert 0.0 < engine.kv_usage() <= 1.0
    assert engine.num_running == 1
    engine.abort(generation)
    while engine.has_work():
        engine.step()
    assert engine.kv_usage() == 0.0
