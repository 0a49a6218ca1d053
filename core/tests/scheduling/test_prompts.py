"""How prompts share a step: few at a time, none more than its share, urgent ones first."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from support.control_plane import Engine, cut, expected_output, full, new_request, sliding

FULL = (full(),)


def engine(budget=16, *, partial=2, chunk=None, policy="fcfs", num_blocks=200, specs=FULL, **options):
    limits = {"max_partial_prefills": partial, "max_prefill_chunk": chunk}
    return Engine(cut(specs, num_blocks), budget=budget, policy=policy, limits=limits, **options)


def of_length(request_id, length, **fields):
    return new_request(request_id, [(request_id * 31 + i * 7) % 97 for i in range(length)], **fields)


def test_alone_a_prompt_gets_the_whole_step():
    stack = engine(chunk=4)
    stack.add(of_length(0, 40))
    stack.step()
    assert stack.plans[0].num_tokens == [16]


def test_a_short_prompt_does_not_wait_behind_a_long_one():
    stack = engine(chunk=8)
    stack.add(of_length(0, 60))
    stack.step()
    short = of_length(1, 5)
    stack.add(short)
    stack.step()
    assert (short.num_output_tokens, stack.plans[-1].num_tokens) == (1, [11, 5])


def test_what_the_others_leave_goes_to_the_first():
    stack = engine(chunk=4)
    stack.add(of_length(0, 60), of_length(1, 3))
    stack.step()
    assert dict(zip(stack.plans[0].request_ids, stack.plans[0].num_tokens, strict=True)) == {0: 13, 1: 3}
    assert stack.plans[0].samples == [False, True]


def test_only_so_many_prompts_are_computed_in_part():
    stack = engine(budget=30, partial=2, chunk=4)
    stack.add(*(of_length(i, 50) for i in range(5)), of_length(5, 2))
    stack.step()
    assert sorted(stack.plans[0].request_ids) == [0, 1, 5], "a short prompt ends at once and needs no place"


def test_an_urgent_prompt_takes_the_place_of_the_last_and_that_one_resumes():
    stack = engine(budget=8, partial=1, chunk=8, policy="priority")
    slow = of_length(0, 60, priority=5)
    stack.add(slow)
    stack.step()
    urgent = of_length(1, 20, priority=0)
    stack.add(urgent)
    stack.step()
    assert (stack.planned(urgent), stack.planned(slow)) == ([0, 8], [8, 0])
    stack.run()
    assert slow.num_preemptions == 0
    assert stack.planned(urgent)[1:4] == [8, 8, 4], "at full speed"
    assert all(r.output_token_ids == expected_output(r, stack.specs) for r in (slow, urgent))


def test_decodes_go_on_whatever_prompts_come():
    stack = engine(budget=12, partial=2, chunk=4)
    decode = new_request(0, [1], max_total_tokens=40)
    stack.add(decode)
    stack.step()
    for number in range(1, 8):
        stack.add(of_length(number, 50))
    while not decode.finished:
        stack.step()
    assert stack.planned(decode) == [1] * 39


def test_a_victim_that_was_to_be_extended_is_left_out():
    """Blocks run out while prompts are planned: plans stay consistent and texts right (the runner checks both)."""
    for seed in range(20):
        chance = random.Random(seed)
        stack = engine(chance.choice([8, 16]), partial=3, chunk=4, num_blocks=14, policy="priority", max_num_seqs=6)
        requests = [of_length(i, chance.randrange(1, 30), priority=chance.randrange(3)) for i in range(12)]
        for request in requests:
            stack.add(request)
            stack.step()
        stack.run()
        assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["fcfs", "priority", "fair"]), st.integers(1, 3), st.integers(1, 9))
def test_bounds_hold_in_every_step(seed, policy, partial, chunk):
    chance = random.Random(seed)
    specs = chance.choice([(full(),), (full(), sliding(6))])
    stack = engine(16, partial=partial, chunk=chunk, policy=policy, specs=specs, num_blocks=chance.choice([30, 200]))
    requests = [of_length(i, chance.choice([1, 3, 20, 40]), priority=chance.randrange(2)) for i in range(15)]
    for request in requests:
        stack.add(request)
        if chance.random() < 0.5:
            stack.step()
    stack.run()
    for plan in stack.plans:
        assert plan.total_tokens <= 16
        assert plan.samples.count(False) <= partial
        assert min(plan.num_tokens, default=1) > 0
    assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)
