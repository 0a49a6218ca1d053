"""Speculation through the whole engine: the text is that without it, also under preemption, and the counts add up."""

from dataclasses import replace
from pathlib import Path

import pytest

from support.greedy_parity import FailingReserve, assert_greedy_parity, checkpoint, prompts, settings
from zif import LLM, RequestOutput, SamplingParams
from zif.kv import PagedBlockManager

FAMILIES = ("llama3", "gemma2", "qwen3_next", "granite_hybrid")
NUM_OUTPUT_TOKENS = 24
OPTIONS = (
    SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0.6, top_k=4, seed=5, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.6, seed=6, max_tokens=NUM_OUTPUT_TOKENS, n=2, repetition_penalty=0.8),
    SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS - 1, min_tokens=9, logit_bias={7: 9.0, 8: 9.0}),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def generate(model: Path, **options: object) -> list[RequestOutput]:
    repeated = [{"prompt_token_ids": list(prompt[:8] * 4)} for prompt in prompts()[1:5]]
    with LLM.from_settings(settings(model, block_size=8, **options)) as llm:
        outputs = llm.generate(repeated, list(OPTIONS), use_tqdm=False)
        llm.engine.check_integrity()
    return outputs


def texts(outputs: list[RequestOutput]) -> list[tuple[list[int], str | None, int]]:
    return [(s.token_ids, s.finish_reason, len(s.logprobs or ())) for output in outputs for s in output.outputs]


def counts(outputs: list[RequestOutput]) -> tuple[int, int]:
    metrics = [output.metrics for output in outputs if output.metrics]
    return sum(m.num_drafted_tokens for m in metrics), sum(m.num_accepted_tokens for m in metrics)


@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_no_token(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(family, root)
    expected = generate(model)
    assert counts(expected) == (0, 0)
    for options in ({"max_draft_tokens": 3}, {"max_num_batched_tokens": 7, "enable_prefix_caching": False}):
        outputs = generate(model, speculation="ngram", **options)
        assert texts(outputs) == texts(expected)
        drafted, accepted = counts(outputs)
        assert 0 < accepted <= drafted
    failing = FailingReserve()
    monkeypatch.setattr(PagedBlockManager, "reserve", lambda *args: failing(*args))
    preempted = generate(model, speculation="ngram")
    assert texts(preempted) == texts(expected)
    assert sum(output.metrics.num_preemptions for output in preempted if output.metrics)


@pytest.mark.parametrize("family", ["llama3", "qwen3_next"])
def test_greedy_tokens_equal_transformers(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_greedy_parity(family, root, monkeypatch, speculation="ngram", max_num_batched_tokens=64)


def test_a_stop_string_among_accepted_guesses_ends_the_request_at_its_token(root: Path) -> None:
    """One row may bring more tokens than the request may say."""
    model = checkpoint("llama3", root)
    greedy = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=0, logit_bias={7: 9.0, 8: 9.0})
    prompt = {"prompt_token_ids": list(prompts()[2][:8] * 4)}
    ends = []
    for speculation in ("off", "ngram"):
        with LLM.from_settings(settings(model, speculation=speculation)) as llm:
            text = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].text
            stops = sorted({text[i : i + 3] for i in range(6, 40, 3)} - {""})
            options = [replace(greedy, stop=[stop]) for stop in stops]
            outputs = [output.outputs[0] for output in llm.generate([prompt] * len(stops), options, use_tqdm=False)]
        ends.append([(o.text, o.token_ids, o.finish_reason, o.stop_reason, len(o.logprobs or ())) for o in outputs])
    assert ends[0] == ends[1]
    assert all(reason == "stop" for _, _, reason, _, _ in ends[0])
    assert all(len(tokens) == num_logprobs < 48 for _, tokens, _, _, num_logprobs in ends[0])
