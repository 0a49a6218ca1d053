"""L5, the engine: tiny models of every layer kind end to end, whatever happens to a request on its way."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from zif import LLM, SamplingParams
from zif.contract import Feature
from zif.errors import EngineError, RequestError
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import PRINTABLE, VOCAB_SIZE
from zif_conformance.tiny_models.models import (
    TinyModels,
    answer,
    families,
    greedy,
    hold_answers,
    prompt_tokens,
)

_FULL = (Feature.ATTENTION_FULL,)
_KINDS = ("dense", "window", "hybrid")


@pytest.fixture(scope="module")
def llm(tiny: TinyModels) -> Iterator[LLM]:
    """The dense model, for tests that want no settings of their own."""
    with tiny.open("dense") as opened:
        yield opened


def _lengths(block: int) -> list[int]:
    return [1, block - 1, block, block + 1, 3 * block + 2]


@conforms(level="L5", gate="G7", clause="10.2")
@pytest.mark.parametrize("family", families())
def test_logprobs_of_a_prompt(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    prompt = prompt_tokens(40)
    with tiny.open(family) as opened:
        (output,) = answer(opened, [prompt], greedy(1, prompt_logprobs=VOCAB_SIZE))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    rows = [[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in output.prompt_logprobs[1:] if entry]
    assert len(rows) == len(prompt) - 1
    tiny.truth(family).hold_logprobs(record_gate, prompt[:-1], torch.tensor(rows))


@conforms(level="L5", gate="G7", clause=("8.1", "10.1", "10.2"))
@pytest.mark.parametrize("family", families())
def test_greedy_tokens_of_a_mixed_batch(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    prompts = [prompt_tokens(length, number) for number, length in enumerate(_lengths(tiny.block_size))]
    with tiny.open(family) as opened:
        hold_answers(tiny.truth(family), record_gate, answer(opened, prompts, greedy(20)), 20)


@conforms(level="L5", gate="G7", clause="10.2", claims=(*_FULL, Feature.TRANSFORMERS_BACKEND))
def test_greedy_tokens_of_the_generic_backend(tiny: TinyModels, record_gate: GateRecorder) -> None:
    with tiny.open("dense", model_impl="transformers") as opened:
        outputs = answer(opened, [prompt_tokens(30), prompt_tokens(5, 1)], greedy(12))
    hold_answers(tiny.truth("dense"), record_gate, outputs, 12)


@conforms(level="L5", gate="G7", clause="10.3")
@pytest.mark.parametrize("change", [-1, 0, 1])
@pytest.mark.parametrize("family", families(*_KINDS))
def test_prompts_cut_near_a_block_border(tiny: TinyModels, record_gate: GateRecorder, family: str, change: int) -> None:
    budget = tiny.block_size + change
    with tiny.open(family, max_num_batched_tokens=budget, max_num_seqs=2) as opened:
        outputs = answer(opened, [prompt_tokens(3 * tiny.block_size + 1, n) for n in range(3)], greedy(9))
    hold_answers(tiny.truth(family), record_gate, outputs, 9)


@conforms(level="L5", gate="G7", clause="10.3", negative=True)
@pytest.mark.parametrize("family", families(*_KINDS))
def test_requests_that_lose_their_blocks_resume(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    changes = {"expected_output_percent": 0, "enable_prefix_caching": False}
    length = tiny.max_model_len - 17
    with tiny.open_cramped(family, **changes) as opened:
        outputs = answer(opened, [prompt_tokens(17, n) for n in range(6)], greedy(length))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    hold_answers(tiny.truth(family), record_gate, outputs, length)


@conforms(level="L5", gate="G7", clause="10.3", claims=(Feature.PREFIX_CACHING,))
@pytest.mark.parametrize("family", families(*_KINDS))
def test_a_prefix_found_equals_one_computed(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    block = tiny.block_size
    known = prompt_tokens(3 * block + 2)
    shared = range(2 * block + 2)
    prompts = [[*known[:n], (known[n] + 1) % 256, *prompt_tokens(3, n)] for n in shared]
    with tiny.open(family) as opened:
        answer(opened, [known], greedy(4))
        outputs = answer(opened, prompts, greedy(6))
    hold_answers(tiny.truth(family), record_gate, outputs, 6)
    found = [output.num_cached_tokens for output in outputs]
    assert all(cached <= n for cached, n in zip(found, shared, strict=True)), found
    if family == "hybrid":
        # Which states are kept is core's choice; without any, nothing was found and nothing proven.
        assert any(found)
    else:
        assert found == [n // block * block for n in shared]


@conforms(level="L5", gate="G7", clause="10.3", claims=(*_FULL, Feature.PREFIX_CACHING), negative=True)
def test_another_salt_finds_nothing(tiny: TinyModels, llm: LLM, record_gate: GateRecorder) -> None:
    prompt = prompt_tokens(4 * tiny.block_size, 50)
    answer(llm, [prompt], greedy(2))
    outputs = llm.generate({"prompt_token_ids": prompt, "cache_salt": "other"}, greedy(6), use_tqdm=False)
    assert outputs[0].num_cached_tokens == 0
    hold_answers(tiny.truth("dense"), record_gate, outputs, 6)


@conforms(level="L5", clause="10.2", claims=_FULL)
def test_a_stream_grows_and_ends_like_generate(llm: LLM) -> None:
    prompt = prompt_tokens(11, 2)
    parts = [output.outputs[0] for output in llm.stream({"prompt_token_ids": prompt}, greedy(9))]
    whole = answer(llm, [prompt], greedy(9))[0].outputs[0]
    texts = [part.text for part in parts]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert (parts[-1].token_ids, parts[-1].text) == (whole.token_ids, whole.text)
    assert len(parts) > 1


@conforms(level="L5", clause="10.2", claims=_FULL)
def test_a_stop_token_ends_the_answer(llm: LLM) -> None:
    whole = answer(llm, [prompt_tokens(13, 3)], greedy(12))[0].outputs[0].token_ids
    stop = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    sample = answer(llm, [prompt_tokens(13, 3)], greedy(12, stop_token_ids=[stop]))[0].outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.token_ids == whole[: whole.index(stop) + 1]


@conforms(level="L5", clause="10.2", claims=_FULL)
def test_a_stop_string_cuts_the_text(llm: LLM) -> None:
    whole = answer(llm, [prompt_tokens(13, 4)], greedy(30, allowed_token_ids=PRINTABLE))[0].outputs[0].text
    stop = whole[3:5]
    sample = answer(llm, [prompt_tokens(13, 4)], greedy(30, allowed_token_ids=PRINTABLE, stop=stop))[0].outputs[0]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == whole[: whole.index(stop)]


@conforms(level="L5", gate="G7", clause="10.2", claims=_FULL)
def test_logprobs_of_an_answer(tiny: TinyModels, llm: LLM, record_gate: GateRecorder) -> None:
    prompt = prompt_tokens(2 * tiny.block_size + 3, 5)
    sample = answer(llm, [prompt], greedy(10, logprobs=VOCAB_SIZE))[0].outputs[0]
    assert sample.logprobs is not None
    rows = torch.tensor([[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in sample.logprobs])
    tiny.truth("dense").hold_logprobs(record_gate, [*prompt, *sample.token_ids[:-1]], rows)
    assert [entry[token].rank for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)] == [1] * 10


@conforms(level="L5", gate="G7", clause=("8.4", "10.3"), claims=_FULL)
def test_samples_of_one_prompt_do_not_disturb_each_other(tiny: TinyModels, llm: LLM, record_gate: GateRecorder) -> None:
    (output,) = answer(llm, [prompt_tokens(2 * tiny.block_size + 3, 6)], greedy(10, n=4))
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    hold_answers(tiny.truth("dense"), record_gate, [output], 10)


@conforms(level="L5", clause="10.5", claims=_FULL)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63)])
def test_a_seed_repeats(llm: LLM, seed: int) -> None:
    sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=16, ignore_eos=True)
    first, again = (answer(llm, [prompt_tokens(9, 7)], sampling)[0].outputs[0].token_ids for _ in range(2))
    assert first == again


@conforms(level="L5", clause="10.5", claims=_FULL, negative=True)
def test_other_seeds_give_other_answers(llm: LLM) -> None:
    samplings = [SamplingParams(temperature=1.5, seed=seed, max_tokens=16, ignore_eos=True) for seed in range(4)]
    answers = {tuple(answer(llm, [prompt_tokens(9, 7)], one)[0].outputs[0].token_ids) for one in samplings}
    assert len(answers) == 4


@conforms(level="L5", gate="G7", clause=("10.6", "10.7"), claims=_FULL, negative=True)
def test_an_abandoned_stream_leaves_nothing(tiny: TinyModels, llm: LLM, record_gate: GateRecorder) -> None:
    stream = llm.stream({"prompt_token_ids": prompt_tokens(20, 8)}, greedy(50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    while llm.engine.has_work():
        llm.engine.step()
    llm.engine.check_integrity()
    hold_answers(tiny.truth("dense"), record_gate, answer(llm, [prompt_tokens(20, 9)], greedy(8)), 8)


@conforms(level="L5", gate="G7", clause="10.6", claims=_FULL, negative=True)
def test_a_late_answer_is_aborted_and_its_neighbour_is_whole(
    tiny: TinyModels, llm: LLM, record_gate: GateRecorder
) -> None:
    late = {"prompt_token_ids": prompt_tokens(20, 10), "timeout_s": 1e-9}
    outputs = llm.generate([late, {"prompt_token_ids": prompt_tokens(20, 11)}], greedy(8), use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "abort"
    hold_answers(tiny.truth("dense"), record_gate, outputs[1:], 8)


@conforms(level="L5", clause="5.1", claims=_FULL, negative=True)
def test_a_closed_engine_answers_no_more(tiny: TinyModels) -> None:
    opened = tiny.open("dense")
    opened.close()
    opened.close()
    with pytest.raises((EngineError, RequestError), match="closed"):
        answer(opened, [prompt_tokens(3)], greedy(2))
