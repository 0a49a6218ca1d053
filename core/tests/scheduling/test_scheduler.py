"""What each step computes: budgets, order, preemption, sharing, and how requests end."""

import random

import pytest

from support.control_plane import Engine, cut, expected_output, full, new_request, samples_of, sliding
from zif.contract import (
    CacheKey,
    FinishReason,
    RequestStatus,
    SamplingParams,
    StepResult,
)
from zif.errors import ConfigError

LONG = list(range(40))
FULL = (full(),)


def engine(num_blocks=64, specs=FULL, **options):
    return Engine(cut(specs, num_blocks), **options)


def prompt(seed, length):
    return [(seed * 31 + position * 7) % 97 for position in range(length)]


def outputs_are_right(stack, *requests):
    return all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)


class TestBudget:
    @pytest.mark.parametrize("budget", [1, 7, 64])
    def test_prefill_is_cut_to_the_budget_and_the_text_stays_the_same(self, budget):
        stack = engine(budget=budget)
        requests = [new_request(0, LONG), new_request(1, prompt(1, 11)), new_request(2, prompt(2, 1))]
        stack.add(*requests)
        stack.run()
        assert all(plan.total_tokens == sum(plan.num_tokens) <= budget for plan in stack.plans)
        assert outputs_are_right(stack, *requests)
        assert [r.num_output_tokens for r in requests] == [8, 8, 8]

    @pytest.mark.parametrize("budget", [7, 64])
    def test_a_decode_never_waits_for_a_long_prompt(self, budget):
        stack = engine(budget=budget)
        decode, late = new_request(0, [5]), new_request(1, LONG)
        stack.add(decode)
        stack.step()
        stack.add(late)
        while not decode.finished:
            stack.step()
        assert stack.planned(decode) == [1] * 8
        assert stack.planned(late)[1] == min(40, budget - 1), "the prompt gets what is left"

    def test_single_tokens_come_before_prompt_chunks_even_of_earlier_requests(self):
        stack = engine(budget=7)
        early, decode = new_request(0, LONG), new_request(1, [5])
        stack.add(decode)
        stack.step()
        stack.add(early)
        stack.step()
        assert (stack.planned(decode), stack.planned(early)) == ([1, 1], [0, 6])

    def test_only_the_last_chunk_samples(self):
        stack = engine(budget=16)
        stack.add(new_request(0, LONG))
        for _ in range(3):
            stack.step()
        assert [plan.num_tokens for plan in stack.plans] == [[16], [16], [8]]
        assert [plan.samples for plan in stack.plans] == [[False], [False], [True]]

    def test_no_more_requests_run_than_max_num_seqs(self):
        stack = engine(max_num_seqs=2)
        stack.add(*(new_request(i, prompt(i, 3)) for i in range(5)))
        stack.step()
        assert (stack.scheduler.num_running, stack.scheduler.num_waiting) == (2, 3)
        stack.run()
        assert max(len(plan.request_ids) for plan in stack.plans) == 2

    def test_nothing_to_do_is_no_plan(self):
        assert engine().scheduler.schedule() is None
        assert not engine().scheduler.has_requests()


class TestOrder:
    def test_first_come_first_served(self):
        stack = engine(max_num_seqs=1)
        requests = [new_request(i, prompt(i, 3), priority=-i) for i in range(3)]
        stack.add(*reversed(requests))
        stack.run()
        starts = [start.request_id for plan in stack.plans for start in plan.started]
        assert starts == [0, 1, 2]

    def test_the_smaller_priority_number_first_then_arrival(self):
        stack = engine(max_num_seqs=1, policy="priority")
        stack.add(*(new_request(i, prompt(i, 3), priority=p) for i, p in enumerate((1, 0, 1, -1))))
        stack.run()
        assert [start.request_id for plan in stack.plans for start in plan.started] == [3, 1, 0, 2]

    def test_an_unknown_policy_is_refused(self):
        with pytest.raises(ConfigError, match="sjf"):
            engine(policy="sjf")


class TestPreemption:
    def tight(self, priorities=(0, 0, 0), **options):
        """Three requests that each need 5 of 9 blocks in the end."""
        stack = engine(num_blocks=9, **options)
        requests = [new_request(i, prompt(i, 7), max_total_tokens=20, priority=p) for i, p in enumerate(priorities)]
        stack.add(*requests)
        return stack, requests

    @pytest.mark.parametrize("caching", [True, False])
    def test_the_last_gives_way_the_first_progresses_and_the_text_stays_the_same(self, caching):
        stack, requests = self.tight(caching=caching)
        while stack.scheduler.has_requests():
            running = [r for r in requests if r.status is RequestStatus.RUNNING]
            before = {r.request_id: r.num_tokens for r in running}
            stack.step()
            preempted = [r for r in running if r.status is RequestStatus.PREEMPTED]
            assert [r for r in running if r not in preempted] + preempted == running, "a victim before a survivor"
            if running:
                assert running[0].num_tokens == before[running[0].request_id] + 1
        assert requests[0].num_preemptions == 0
        assert sum(r.num_preemptions for r in requests) > 0
        assert outputs_are_right(stack, *requests)
        assert stack.num_owned == (0,)

    def test_priority_chooses_the_victim(self):
        stack, requests = self.tight(policy="priority", priorities=(1, 0, 0))
        while not any(r.num_preemptions for r in requests):
            stack.step()
        assert [r.num_preemptions for r in requests] == [1, 0, 0]
        stack.run()
        assert outputs_are_right(stack, *requests)

    def test_the_runner_is_told_to_let_go_and_later_to_start_with_all_known_tokens(self):
        stack, requests = self.tight()
        victim = requests[2]
        while not victim.num_preemptions:
            stack.step()
        known = list(victim.token_ids)
        assert victim.request_id in stack.plans[-1].released
        assert victim.request_id not in stack.plans[-1].request_ids
        while victim.status is RequestStatus.PREEMPTED:
            stack.step()
        (start,) = [s for s in stack.plans[-1].started if s.request_id == victim.request_id]
        assert start.token_ids[: len(known)] == known
        assert start.num_prompt_tokens == 7

    def test_a_victim_planned_in_this_very_step_leaves_no_row_and_no_block_update(self):
        """The decode of request 1 takes the last block; then the prompt of request 0, earlier in order, needs it."""
        stack = engine(num_blocks=6, budget=9, caching=False)
        early, late = new_request(0, LONG[:20], max_total_tokens=21), new_request(1, prompt(1, 1), max_total_tokens=9)
        stack.add(late)
        for _ in range(2):
            stack.step()
        stack.add(early)
        for _ in range(3):
            stack.step()
        plan = stack.plans[-1]
        assert (plan.request_ids, plan.num_computed, plan.num_tokens, plan.samples) == ([0], [16], [4], [True])
        assert plan.released == [1]
        assert {update.request_id for update in plan.block_updates} == {0}
        assert stack.planned(late) == [1, 1, 1, 1, 0]
        stack.run()
        assert outputs_are_right(stack, early, late)

    def test_an_aborted_victim_is_gone_for_good(self):
        stack, requests = self.tight()
        while not requests[2].num_preemptions:
            stack.step()
        assert stack.scheduler.finish(2, FinishReason.ABORT) is requests[2]
        stack.run()
        assert stack.num_owned == (0,)
        assert sum(plan.released.count(2) for plan in stack.plans) == 1

    @pytest.mark.parametrize("caching", [True, False])
    def test_a_request_that_fits_ends_however_blocks_lie_scattered(self, caching):
        """Two groups share slabs of several blocks; ended requests leave holes out of which no slab can be made."""
        for seed in range(40):
            chance = random.Random(seed)
            specs = (full(chance.choice([2, 4, 8])), sliding(chance.choice([1, 3, 5, 9, 16]), chance.choice([2, 4, 8])))
            slab_words = chance.choice([1, 2, 4]) * max(spec.block_size for spec in specs)
            arena = cut(specs, chance.randrange(3, 11), slab_words)
            stack = Engine(arena, budget=chance.choice([1, 4, 16, 64]), max_num_seqs=4, caching=caching)
            longest = max((n for n in range(1, 200) if stack.blocks.fits(n)), default=0)
            if longest < 8:
                continue
            for request_id in range(4):
                length = chance.randrange(1, longest)
                stack.add(new_request(request_id, prompt(request_id, length), max_total_tokens=longest))
            requests = stack.scheduler.live_requests()
            stack.run()
            assert outputs_are_right(stack, *requests), seed
            assert stack.num_owned == (0, 0)


class TestPrefixReuse:
    def test_the_second_identical_prompt_computes_at_most_one_block(self):
        stack = engine()
        for request_id in range(2):
            stack.add(new_request(request_id, LONG))
            stack.run()
        computed = sum(stack.planned(new_request(1, LONG)))
        assert computed - 7 <= 4, "7 of the 8 outputs are computed too"

    def test_a_salt_separates(self):
        stack = engine()
        requests = [new_request(i, LONG, cache_key=CacheKey(salt=salt)) for i, salt in enumerate("aba")]
        for request in requests:
            stack.add(request)
            stack.run()
        assert [r.num_cached_tokens for r in requests] == [0, 0, 36]

    def test_prompt_logprobs_compute_every_prompt_token_even_as_a_parallel_sample(self):
        stack = engine()
        stack.add(new_request(0, LONG))
        stack.run()
        asked = samples_of(1, LONG, 2, sampling=SamplingParams(prompt_logprobs=1))
        stack.add(*asked)
        stack.run()
        assert [sum(stack.planned(r)) for r in asked] == [40 + 7, 40 + 7]
        assert [r.num_cached_tokens for r in asked] == [0, 0]

    def test_cached_tokens_are_those_of_the_first_admission(self):
        stack = engine(num_blocks=9)
        requests = [new_request(i, prompt(i, 7), max_total_tokens=20) for i in range(3)]
        stack.add(*requests)
        stack.run()
        assert requests[2].num_preemptions > 0
        assert requests[2].num_cached_tokens == 0

    def test_what_a_faulty_step_computed_is_not_found_by_others(self):
        stack = engine(budget=64)
        faulty, next_one = new_request(0, LONG), new_request(1, LONG)
        stack.add(faulty)
        stack.step(faults={0: "not a number"})
        stack.add(next_one)
        stack.run()
        assert next_one.num_cached_tokens == 0


class TestParallelSamples:
    @pytest.mark.parametrize("caching", [True, False])
    def test_the_prompt_is_computed_and_stored_once(self, caching):
        stack = engine(caching=caching, budget=64)
        siblings = samples_of(0, LONG, 4)
        stack.add(*siblings)
        stack.step()
        assert stack.scheduler.num_running == 1, "the others wait for the prompt"
        stack.step()
        assert stack.scheduler.num_running == 4
        # 9 whole blocks shared; the tenth one and the next are each sample's own.
        assert stack.num_owned[0] <= 9 + 4 * 2
        assert [sum(stack.planned(s)) for s in siblings[1:]] == [4, 4, 4]
        stack.run()
        assert outputs_are_right(stack, *siblings)
        assert [s.num_output_tokens for s in siblings] == [8] * 4

    @pytest.mark.parametrize("caching", [True, False])
    @pytest.mark.parametrize("when", [0, 1, 2, 3])
    def test_the_others_go_on_when_the_leader_is_aborted(self, caching, when):
        stack = engine(caching=caching, budget=16)
        siblings = samples_of(0, LONG, 3)
        stack.add(*siblings)
        for _ in range(when):
            stack.step()
        stack.scheduler.finish(0, FinishReason.ABORT)
        stack.run()
        assert [s.finish_reason for s in siblings] == [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.LENGTH]
        assert outputs_are_right(stack, *siblings)
        assert stack.num_owned == (0,)

    @pytest.mark.parametrize("caching", [True, False])
    def test_the_others_go_on_when_the_leader_ends_at_once(self, caching):
        stack = engine(caching=caching)
        siblings = samples_of(0, LONG, 3)
        siblings[0].max_total_tokens = 41
        stack.add(*siblings)
        stack.run()
        assert [s.num_output_tokens for s in siblings] == [1, 8, 8]
        assert outputs_are_right(stack, *siblings)

    @pytest.mark.parametrize("caching", [True, False])
    @pytest.mark.parametrize("specs", [(full(),), (full(), sliding(5))], ids=["full", "windowed"])
    def test_preempted_samples_resume_with_the_same_text(self, caching, specs):
        stack = engine(num_blocks=8 + 6 * len(specs[1:]), specs=specs, caching=caching, policy="priority")
        siblings = samples_of(1, prompt(1, 7), 3, max_total_tokens=24)
        siblings[0].priority = 1
        stack.add(*siblings)
        for _ in range(3):
            stack.step()
        stack.add(new_request(0, prompt(3, 20), max_total_tokens=30, priority=-1))
        stack.run()
        assert sum(s.num_preemptions for s in siblings) > 0
        assert outputs_are_right(stack, *siblings)


class TestEnds:
    def test_unknown_finished_and_repeated_ids_are_nobody(self):
        stack = engine()
        done, aborted = new_request(0, [1]), new_request(1, [2], max_total_tokens=100)
        stack.add(done, aborted)
        while not done.finished:
            stack.step()
        assert stack.scheduler.finish(7, FinishReason.ABORT) is None
        assert stack.scheduler.finish(0, FinishReason.ABORT) is None
        assert done.finish_reason is FinishReason.LENGTH
        assert stack.scheduler.finish(1, FinishReason.ABORT) is aborted
        assert stack.scheduler.finish(1, FinishReason.STOP) is None
        assert aborted.finish_reason is FinishReason.ABORT
        stack.run()
        assert [plan.released for plan in stack.plans[-1:]] == [[0, 1]]

    def test_an_abort_while_the_step_is_under_way_drops_its_result(self):
        stack = engine()
        request = new_request(0, [1, 2])
        stack.add(request)
        plan = stack.scheduler.schedule()
        result = stack.runner.submit(plan).result()
        stack.scheduler.finish(0, FinishReason.ABORT)
        assert stack.scheduler.update(plan, result) == []
        assert request.token_ids == [1, 2]
        stack.run()
        assert stack.num_owned == (0,)

    def test_a_fault_ends_one_request_and_returns_its_blocks(self):
        stack = engine()
        good, bad = new_request(0, prompt(0, 5)), new_request(1, prompt(1, 5))
        stack.add(good, bad)
        stack.step()
        (update, other) = sorted(stack.step(faults={1: "not a number"}), key=lambda u: -u.request.request_id)
        assert (update.request, update.new_token_ids) == (bad, [])
        assert (bad.finish_reason, bad.error) == (FinishReason.ERROR, "not a number")
        assert bad.num_output_tokens == 1
        assert other.request is good
        assert stack.num_owned == (2,)
        stack.run()
        assert good.finish_reason is FinishReason.LENGTH
        assert outputs_are_right(stack, good)

    @pytest.mark.parametrize(("min_tokens", "position"), [(0, 0), (1, 0), (2, 3), (4, 3)])
    def test_stop_ids_count_from_min_tokens(self, min_tokens, position):
        """The tokens at indices 0 and 3 of the output are stop ids; min_tokens includes the stop token itself."""
        probe = new_request(0, prompt(3, 5), max_total_tokens=20)
        stack = engine()
        stack.add(probe)
        stack.run()
        text = probe.output_token_ids
        assert text[0] not in text[1:4]
        assert text[3] not in text[:3]
        request = new_request(
            0,
            prompt(3, 5),
            max_total_tokens=20,
            stop_ids=frozenset({text[0], text[3]}),
            sampling=SamplingParams(min_tokens=min_tokens),
        )
        stack = engine()
        stack.add(request)
        stack.run()
        assert request.finish_reason is FinishReason.STOP
        assert request.stop_token_id == text[position]
        assert request.output_token_ids == text[: position + 1]

    def test_a_stop_token_at_the_last_place_is_a_stop(self):
        probe = new_request(0, [1, 2], max_total_tokens=3)
        stack = engine()
        stack.add(probe)
        stack.run()
        request = new_request(0, [1, 2], max_total_tokens=3, stop_ids=frozenset(probe.output_token_ids))
        stack = engine()
        stack.add(request)
        stack.run()
        assert (probe.finish_reason, request.finish_reason) == (FinishReason.LENGTH, FinishReason.STOP)

    def test_several_sampled_tokens_are_cut_at_the_end_of_the_request(self):
        """A runner may give more than one token a step."""
        stack = engine()
        request = new_request(0, [1, 2], max_total_tokens=5)
        stack.add(request)
        plan = stack.scheduler.schedule()
        (update,) = stack.scheduler.update(plan, StepResult(plan.step, [[7, 8, 9, 10]]))
        assert update.new_token_ids == [7, 8, 9] == request.output_token_ids
        assert request.finish_reason is FinishReason.LENGTH

    def test_two_requests_with_one_id_are_an_invariant_fault(self):
        stack = engine()
        stack.add(new_request(0, [1]))
        with pytest.raises(AssertionError, match="taken"):
            stack.add(new_request(0, [1]))
