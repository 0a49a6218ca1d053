"""Who may start: passing what does not fit, and looking ahead at what running requests will take."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.control_plane import Engine, cut, expected_output, full, new_request, sliding
from zif.contract import FinishReason, RequestStatus
from zif.scheduling.admission import Admission
from zif.scheduling.policies import PATIENCE_S

FULL = (full(),)


def engine(num_blocks, *, percent=0, specs=FULL, max_bypasses=16, **options):
    limits = {"expected_output_percent": percent, "max_bypasses": max_bypasses}
    return Engine(cut(specs, num_blocks), limits=limits, **options)


def small(request_id, tokens=1, output=3):
    return new_request(request_id, [request_id % 97] * tokens, max_total_tokens=tokens + output)


class TestPassing:
    def occupied(self, **options):
        """Of 12 blocks one request holds 6; the next in line needs 10."""
        stack = engine(12, caching=False, budget=64, **options)
        holder, big = small(0, tokens=21, output=3), small(1, tokens=39, output=1)
        stack.add(holder)
        stack.step()
        stack.add(big)
        return stack, holder, big

    def test_a_later_request_that_fits_goes_past_one_that_does_not(self):
        stack, _, big = self.occupied()
        passer = small(2)
        stack.add(passer)
        stack.step()
        assert (big.status, passer.status) == (RequestStatus.WAITING, RequestStatus.RUNNING)
        assert big.num_bypasses == 1

    @pytest.mark.parametrize("max_bypasses", [0, 1, 3])
    def test_only_so_many_pass(self, max_bypasses):
        stack, _, big = self.occupied(max_bypasses=max_bypasses)
        stack.add(*(small(i) for i in range(2, 7)))
        stack.step()
        assert big.num_bypasses == max_bypasses
        assert stack.scheduler.num_running == 1 + max_bypasses

    def test_nothing_passes_what_has_waited_too_long(self):
        stack, _, big = self.occupied()
        stack.now_s = PATIENCE_S
        stack.add(small(2))
        stack.step()
        assert (big.num_bypasses, stack.scheduler.num_waiting) == (0, 2)

    def test_what_did_not_fit_is_tried_again_when_something_was_given_back(self):
        stack, holder, big = self.occupied()
        while not holder.finished:
            stack.step()
        stack.step()
        assert big.finish_reason is FinishReason.LENGTH

    def test_a_request_that_comes_later_is_tried_although_the_others_were_refused(self):
        stack, _, big = self.occupied()
        stack.step()
        passer = small(2)
        stack.add(passer)
        stack.step()
        assert (passer.status, big.status) == (RequestStatus.RUNNING, RequestStatus.WAITING)

    def steps_until_big_ends(self, blocks, rate, output, max_bypasses, limit):
        """A steady stream of small requests keeps memory busy; somewhere in it stands one that needs nearly all."""
        stack = engine(blocks, max_bypasses=max_bypasses, caching=False, budget=32)
        big = new_request(10_000, [3] * (blocks * 4 - 6), max_total_tokens=blocks * 4 - 3, arrival=4)
        number = 0
        for step in range(limit):
            for _ in range(rate):
                stack.add(small(number, tokens=2, output=output))
                number += 1
            if step == 2:
                stack.add(big)
            if big.finished:
                return step
            stack.step()
        return limit

    @settings(max_examples=25, deadline=None)
    @given(st.integers(6, 14), st.integers(1, 3), st.integers(2, 9), st.integers(0, 12))
    def test_the_big_one_ends_in_a_bounded_number_of_steps(self, blocks, rate, output, max_bypasses):
        # Each of those that pass and of those that run already may have to end first; then the prompt and its answer.
        bound = (max_bypasses + 8 + rate) * (output + 2) + blocks * 4
        assert self.steps_until_big_ends(blocks, rate, output, max_bypasses, bound + 1) <= bound

    def test_without_the_bound_it_would_starve(self):
        assert self.steps_until_big_ends(14, 1, 3, 10**9, 600) == 600

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from(["fcfs", "fair"]), st.integers(0, 100))
    def test_everybody_ends_whatever_the_mix(self, seed, policy, percent):
        chance = random.Random(seed)
        specs = chance.choice([(full(),), (full(), sliding(5)), (sliding(7),)])
        stack = engine(chance.choice([12, 24]), specs=specs, percent=percent, policy=policy, max_bypasses=2)
        requests = []
        for number in range(40):
            size, output = chance.choice([(2, 3), (2, 9), (20, 4)])
            tokens = [chance.randrange(97) for _ in range(size)]
            total = size + output
            requests.append(new_request(number, tokens, max_total_tokens=total, tenant=chance.choice("ab")))
            stack.add(requests[-1])
            stack.step()
        stack.run()
        assert {r.finish_reason for r in requests} == {FinishReason.LENGTH}
        assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)
        assert max(r.num_bypasses for r in requests) <= 2


class TestLookingAhead:
    def trace(self, percent, num_requests=150):
        """Chat-like traffic on a small arena: many short answers, some that use all they may.

        Returns the number of preemptions, of steps, and of tokens computed.
        """
        chance = random.Random(7)
        stack = engine(60, percent=percent, budget=64, max_num_seqs=32, caching=False)
        requests, num_steps = [], 0
        for number in range(num_requests):
            prompt = [chance.randrange(97) for _ in range(chance.choice([4, 8, 30]))]
            stops = frozenset(chance.sample(range(97), 4))
            requests.append(new_request(number, prompt, max_total_tokens=len(prompt) + 60, stop_ids=stops))
            stack.add(requests[-1])
            if number % 3 == 0:
                stack.step()
                num_steps += 1
        while stack.scheduler.has_requests():
            stack.step()
            num_steps += 1
        assert all(r.output_token_ids == expected_output(r, stack.specs) for r in requests)
        return sum(r.num_preemptions for r in requests), num_steps, sum(p.total_tokens for p in stack.plans)

    def test_the_estimate_spares_work_done_twice(self, monkeypatch):
        estimated = self.trace(50)
        monkeypatch.setattr(Admission, "has_room", lambda self, r, running: self._blocks.can_hold(r, r.num_tokens))
        free_now = self.trace(50)
        num_preemptions, num_steps, num_tokens = zip(estimated, free_now, strict=True)
        assert num_preemptions[0] < num_preemptions[1] / 4
        assert num_tokens[0] < 0.75 * num_tokens[1], "little is computed twice"
        assert num_steps[0] < 1.25 * num_steps[1]

    def test_parts_of_prompts_that_are_not_computed_yet_count(self):
        """Two prompts of 9 blocks in 16: the second would be preempted half-way if only free blocks were looked at."""
        stack = engine(16, budget=8, caching=False)
        first, second = small(0, tokens=36, output=1), small(1, tokens=36, output=1)
        stack.add(first, second)
        stack.run()
        assert (first.num_preemptions, second.num_preemptions) == (0, 0)

    def test_an_allowance_beyond_all_memory_does_not_keep_others_out(self):
        """Both may generate 400 tokens where 2,400 fit; four run at a time, not one."""
        stack = engine(600, percent=50, budget=64)
        stack.add(*(new_request(i, [i] * 4, max_total_tokens=1000) for i in range(4)))
        for _ in range(3):
            stack.step()
        assert stack.scheduler.num_running == 4

    def test_the_first_one_starts_alone_however_much_it_may_generate(self):
        stack = engine(10, percent=100)
        request = new_request(0, [1], max_total_tokens=40)
        stack.add(request)
        stack.run()
        assert request.finish_reason is FinishReason.LENGTH
