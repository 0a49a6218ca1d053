"""Numbers that are not finite, on the real model: who computed them fails, and nobody uses what was computed."""

from collections.abc import Iterator

import pytest

from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.engine.generation import Generation
from zif.kv.names import block_names

PREFIX = [11 + i % 50 for i in range(80)]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
MAX_STEPS = 200


@pytest.fixture
def llm() -> Iterator[LLM]:
    """Open the model with prompts cut into chunks, so that blocks are indexed before a fault can be seen."""
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 256, "kv_bytes": 1 << 24}
    with LLM(MODEL, platform="cpu", dtype="float32", block_size=8, **limits) as opened:
        yield opened
        opened.engine.check_integrity()


def begin(llm: LLM, prompt: list[int], sampling: SamplingParams = GREEDY) -> Generation:
    return llm.engine.submit(llm.engine.check({"prompt_token_ids": prompt}, sampling), sampling)


def finish(llm: LLM) -> None:
    for _ in range(MAX_STEPS):
        if not llm.engine.has_work():
            return
        llm.engine.step()
    pytest.fail("the engine does not come to an end")


def answer(llm: LLM, prompt: list[int]) -> list[int]:
    llm.engine.reset_prefix_cache()
    (output,) = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
    llm.engine.reset_prefix_cache()
    return output.outputs[0].token_ids


def findable(llm: LLM, generation: Generation) -> set[bytes]:
    """Return the names of the blocks of one prompt and its answer that anybody could find."""
    names = {name for spec in llm.model.kv_specs for name in block_names(generation.samples[0].request, spec)}
    assert names
    return names & set().union(*llm.engine._parts.block_manager.census())


def begin_and_spoil(llm: LLM, prompt: list[int]) -> Generation:
    """Compute a part of a prompt, the blocks of which others can find, and put NaN into every one of them."""
    generation = begin(llm, prompt)
    while not findable(llm, generation):
        llm.engine.step()
    blocks = llm.engine._parts.runner._blocks
    for group, table in enumerate(generation.samples[0].request.block_ids):
        for block in filter(None, table):
            blocks.write_block(group, block, b"\xff" * len(blocks.read_block(group, block)))
    return generation


def test_nothing_of_a_faulty_request_is_found_and_those_that_shared_it_compute_it_again(llm: LLM) -> None:
    goods = [[*PREFIX, 70 + i] for i in range(3)]
    expected = [answer(llm, prompt) for prompt in goods]
    bad = begin_and_spoil(llm, [*PREFIX, *PREFIX])
    sharers = [begin(llm, prompt) for prompt in goods]
    finish(llm)
    output = llm.engine.output(bad).outputs[0]
    assert output.finish_reason == "error"
    assert "NaN logits" in str(output.error)
    outputs = [llm.engine.output(generation) for generation in sharers]
    assert outputs[0].num_cached_tokens > 0, "the blocks were not shared, so nothing was tried"
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert findable(llm, bad) <= findable(llm, sharers[0]), "what only the faulty request wrote is found"
    # What the others computed again is found, and good; the memory of the faulty one is used again as it was left.
    for prompt, tokens in zip(goods, expected, strict=True):
        (again,) = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
        assert again.num_cached_tokens > 0
        assert again.outputs[0].token_ids == tokens
    assert [answer(llm, prompt) for _ in range(5) for prompt in goods] == expected * 5


def test_nonsense_of_a_request_that_was_given_up_harms_nobody(llm: LLM) -> None:
    prompt = [*PREFIX, 5]
    expected = answer(llm, prompt)
    llm.engine.abort(begin_and_spoil(llm, prompt))
    finder = begin(llm, prompt)
    finish(llm)
    output = llm.engine.output(finder)
    assert output.num_cached_tokens > 0, "the blocks were not found, so nothing was tried"
    assert output.outputs[0].token_ids == expected


def test_options_that_leave_no_token_cost_nobody_the_prefix(llm: LLM) -> None:
    llm.generate({"prompt_token_ids": PREFIX}, GREEDY, use_tqdm=False)
    barred = SamplingParams(max_tokens=2, allowed_token_ids=[3], stop_token_ids=[3], min_tokens=2)
    faulty = begin(llm, PREFIX, barred)
    finish(llm)
    assert "no token is left" in str(llm.engine.output(faulty).outputs[0].error)
    (again,) = llm.generate({"prompt_token_ids": PREFIX}, GREEDY, use_tqdm=False)
    assert again.num_cached_tokens > 0
