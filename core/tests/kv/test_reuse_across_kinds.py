"""Prefix reuse where layer groups differ: what is found, why no more is, and which states are kept for it."""

import pytest

from support.control_plane import Engine, chunked, cut, expected_output, full, latent, new_request, recurrent, sliding
from zif.contract import PrefixMiss, SamplingParams

HYBRID = (full(), recurrent())
PROMPT = list(range(1, 31))


def engine(specs=HYBRID, num_slabs=200, **options):
    return Engine(cut(specs, num_slabs), **options)


def run(engine, prompt, outputs=6, **fields):
    """Answer a prompt, check every token against the oracle, and return the request."""
    request = new_request(len(engine.plans), prompt, max_total_tokens=len(prompt) + outputs, **fields)
    engine.add(request)
    engine.run()
    assert request.output_token_ids == expected_output(request, engine.specs)
    return request


def found(request):
    return request.prefix.num_tokens, request.prefix.miss, request.prefix.kind


@pytest.mark.parametrize(
    "specs", [(full(),), HYBRID, (full(8), sliding(9), chunked(6)), (latent(), recurrent(8)), (recurrent(),)]
)
def test_a_repeated_prompt_is_found_up_to_its_last_block(specs):
    zif = engine(specs)
    run(zif, PROMPT)
    again = run(zif, PROMPT)
    alignment = max(spec.block_size for spec in specs)
    assert found(again) == (29 // alignment * alignment, None, "")


def test_a_longer_prompt_resumes_from_the_prompts_end_of_the_shorter():
    zif = engine()
    run(zif, PROMPT, outputs=1)
    longer = run(zif, PROMPT + list(range(40, 60)))
    assert found(longer) == (28, PrefixMiss.NOT_SEEN, "full")


def test_the_next_turn_resumes_from_the_turns_end():
    zif = engine()
    first = run(zif, PROMPT, outputs=20)
    turn = run(zif, [*first.token_ids, 91, 92, 93, 94, 95])
    assert turn.prefix.num_tokens == (len(first.token_ids) - 1) // 4 * 4


def test_generating_keeps_one_checkpoint_besides_the_prompts():
    zif = engine((recurrent(),))
    run(zif, PROMPT, outputs=40)
    assert zif.blocks.usage()[0].num_cached == 2


def test_a_junction_is_missed_once_and_found_by_the_third():
    zif = engine()
    shared = list(range(1, 21))
    tails = [[50 + i] * 12 for i in range(3)]
    run(zif, shared + tails[0])
    second = run(zif, shared + tails[1])
    third = run(zif, shared + tails[2])
    assert found(second) == (0, PrefixMiss.NO_CHECKPOINT, "recurrent")
    assert third.prefix.num_tokens == 20


def test_a_long_step_leaves_no_state_in_between():
    zif = engine((recurrent(),), budget=64)
    run(zif, PROMPT, outputs=1)
    # Steps ended at the prompt's last whole block and at its end: one checkpoint, and nothing else was written.
    assert zif.blocks.usage()[0].num_cached == 1


def test_reasons_of_a_miss():
    zif = engine((full(),), num_slabs=12)
    assert found(run(zif, PROMPT[:4]))[1] is PrefixMiss.SHORT_PROMPT
    assert found(run(zif, PROMPT))[1] is PrefixMiss.NOT_SEEN
    asked = SamplingParams(prompt_logprobs=0)
    assert found(run(zif, PROMPT, sampling=asked))[1] is PrefixMiss.PROMPT_LOGPROBS
    run(zif, [77] * 40)
    assert found(run(zif, PROMPT)) == (0, PrefixMiss.EVICTED, "full")
    off = engine((full(),), caching=False)
    run(off, PROMPT)
    assert found(run(off, PROMPT))[1] is PrefixMiss.CACHING_OFF


def test_a_recurrent_request_owns_two_states_at_most():
    zif = engine((recurrent(),), caching=False, budget=7)
    zif.add(new_request(0, PROMPT, max_total_tokens=60))
    peak = 0
    while zif.scheduler.has_requests():
        zif.step()
        peak = max(peak, zif.blocks.usage()[0].num_owned)
    assert 1 <= peak <= 2


def test_held_memory_is_the_sum_of_what_each_kind_needs():
    zif = engine((full(16), sliding(32, 16), recurrent(16)), num_slabs=300)
    request = new_request(0, [5] * 1000, max_total_tokens=1100)
    zif.add(request)
    while request.num_computed_tokens < 1040:
        zif.step()
    owned = [usage.num_owned for usage in zif.blocks.usage()]
    assert owned[0] == -(-request.num_computed_tokens // 16)
    assert owned[1] <= 32 // 16 + 1
    assert owned[2] <= 2
