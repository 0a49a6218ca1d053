"""What a platform asks of steps, as data."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.control_plane import Engine, cut, expected_output, full, new_request, recurrent
from zif.contract import SchedulerConstraints
from zif.errors import ContractError

FULL = (full(),)


def engine(constraints, budget=16, num_blocks=200, specs=FULL, **options):
    return Engine(cut(specs, num_blocks), budget=budget, constraints=constraints, **options)


def of_length(request_id, length, **fields):
    return new_request(request_id, [(request_id * 31 + i * 7) % 97 for i in range(length)], **fields)


@pytest.mark.parametrize(
    "constraints",
    [
        SchedulerConstraints(token_alignment=0),
        SchedulerConstraints(token_alignment=32),
        SchedulerConstraints(token_buckets=(8,), token_alignment=16),
        SchedulerConstraints(token_buckets=(0, 8)),
        SchedulerConstraints(batch_buckets=(-1,)),
    ],
    ids=str,
)
def test_what_no_step_can_meet_is_refused(constraints):
    with pytest.raises(ContractError, match="platform's plan"):
        engine(constraints)


@pytest.mark.parametrize(("length", "planned"), [(12, (16, 2)), (3, (6, 2))])
def test_a_step_is_no_larger_than_the_largest_buckets(length, planned):
    stack = engine(SchedulerConstraints(token_buckets=(4, 16), batch_buckets=(1, 2)), budget=64)
    stack.add(*(of_length(i, length) for i in range(4)))
    stack.step()
    assert (stack.plans[0].total_tokens, len(stack.plans[0].request_ids)) == planned
    stack.run()
    assert max(plan.total_tokens for plan in stack.plans) <= 16
    assert max(len(plan.request_ids) for plan in stack.plans) == 2


class TestAlignment:
    def test_prompts_are_cut_at_multiples(self):
        stack = engine(SchedulerConstraints(token_alignment=6), budget=16)
        request = of_length(0, 40)
        stack.add(request)
        stack.run()
        assert stack.planned(request)[:4] == [12, 12, 16, 1], "the end needs no alignment"

    def test_small_requests_cannot_keep_a_prompt_from_its_next_cut(self):
        """A prefix hit ends between two cuts, so the first chunk is short and 12 requests start beside it.

        Their decodes leave 4 of 16 tokens, less than the alignment: nobody new may start until the prompt goes on.
        """
        stack = engine(SchedulerConstraints(token_alignment=8), budget=16, max_num_seqs=16)
        prompt = [(7 * i) % 97 for i in range(40)]
        stack.add(new_request(0, prompt[:5], max_total_tokens=6))
        stack.run()
        long = new_request(1, prompt)
        stack.add(long)
        number = 2
        while not long.num_output_tokens:
            stack.add(*(new_request(number + i, [1], max_total_tokens=6 + (number + i) % 5) for i in range(12)))
            number += 12
            stack.step()
            assert len(stack.plans) < 40
        assert long.num_cached_tokens == 4

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**32), st.integers(1, 9), st.booleans())
    def test_every_cut_is_aligned_and_every_text_right(self, seed, alignment, has_state):
        chance = random.Random(seed)
        specs = (full(), recurrent()) if has_state else (full(),)
        stack = engine(SchedulerConstraints(token_alignment=alignment), num_blocks=60, specs=specs)
        requests = [of_length(chance.randrange(4), chance.randrange(1, 40)) for _ in range(12)]
        for number, request in enumerate(requests):
            request.request_id = request.arrival = number
            stack.add(request)
            stack.step()
        stack.run()
        for plan in stack.plans:
            for computed, count, samples in zip(plan.num_computed, plan.num_tokens, plan.samples, strict=True):
                assert samples or (computed + count) % alignment == 0
        assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)


class TestSeparatePrefill:
    def sorts(self, stack):
        """Return for each step "p" for prompts, "d" for single tokens of requests that run, "" for neither."""
        sorts = []
        for plan in stack.plans:
            started = {start.request_id for start in plan.started}
            rows = zip(plan.request_ids, plan.num_tokens, plan.samples, strict=True)
            # A row of one token that does not sample is a short chunk of a prompt.
            sorts.append("".join(sorted({"p" if i in started or n > 1 or not s else "d" for i, n, s in rows})))
        return sorts

    def test_steps_take_turns(self):
        stack = engine(SchedulerConstraints(separate_prefill=True))
        stack.add(new_request(0, [1], max_total_tokens=9))
        stack.step()
        stack.add(of_length(1, 60))
        for _ in range(6):
            stack.step()
        assert self.sorts(stack) == ["p", "d", "p", "d", "p", "d", "p"]

    def test_without_prompts_every_step_decodes(self):
        stack = engine(SchedulerConstraints(separate_prefill=True))
        stack.add(new_request(0, [1], max_total_tokens=9))
        stack.run()
        assert [s for s in self.sorts(stack) if s] == ["p"] + ["d"] * 7

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from([12, 60]), st.sampled_from(["fcfs", "priority"]))
    def test_no_step_mixes_and_every_text_is_right(self, seed, num_blocks, policy):
        chance = random.Random(seed)
        stack = engine(SchedulerConstraints(separate_prefill=True), num_blocks=num_blocks, policy=policy)
        requests = [of_length(i, chance.choice([1, 5, 30]), priority=chance.randrange(2)) for i in range(12)]
        for request in requests:
            stack.add(request)
            if chance.random() < 0.6:
                stack.step()
        stack.run()
        assert "dp" not in self.sorts(stack)
        assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)
