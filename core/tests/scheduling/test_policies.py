"""Who runs first: fair shares of tenants, and deadlines."""

import random

import pytest

from support.control_plane import Engine, cut, full, new_request
from zif.contract import FinishReason
from zif.scheduling.policies import MAX_TENANTS_KEPT, PATIENCE_S, FairShares


def engine(policy="fcfs", num_blocks=64, **options):
    return Engine(cut((full(),), num_blocks), policy=policy, **options)


def starts(stack):
    return [start.request_id for plan in stack.plans for start in plan.started]


class TestFairShares:
    def backlog(self, sizes, weights=(), num_requests=80):
        """Every tenant has more work than is done; sizes are (prompt, output) tokens by tenant."""
        stack = engine("fair", max_num_seqs=4, limits={"tenant_weights": weights, "expected_output_percent": 50})
        requests = []
        for _ in range(num_requests):
            for tenant, (prompt, output) in sizes.items():
                tokens = [len(requests) % 97] * prompt
                request = new_request(len(requests), tokens, tenant=tenant, max_total_tokens=prompt + output)
                requests.append(request)
                stack.add(request)
        return stack, requests

    def shares(self, stack, requests, num_steps):
        for _ in range(num_steps):
            stack.step()
        done = {t: sum(r.num_tokens for r in requests if r.finished and r.tenant == t) for t in ("a", "b")}
        return done["a"] / done["b"]

    @pytest.mark.parametrize("sizes", [(5, 5), (2, 14)], ids=str)
    def test_tenants_with_work_get_tokens_and_not_requests_in_equal_shares(self, sizes):
        stack, requests = self.backlog({"a": (5, 5), "b": sizes})
        assert self.shares(stack, requests, 150) == pytest.approx(1, rel=0.2)

    def test_weights_count(self):
        stack, requests = self.backlog({"a": (4, 6), "b": (4, 6)}, weights=(("a", 3),))
        assert self.shares(stack, requests, 150) == pytest.approx(3, rel=0.2)

    def test_what_an_answer_did_not_use_is_given_back(self):
        """b may generate 40 tokens and stops after a few, so it is due as much as a, which uses what it may."""
        stack, requests = self.backlog({"a": (4, 6), "b": (4, 40)})
        for request in requests:
            if request.tenant == "b":
                request.stop_ids = frozenset(range(0, 97, 5))
        assert self.shares(stack, requests, 200) == pytest.approx(1, rel=0.25)

    def test_a_crowd_does_not_delay_a_newcomer_of_another_tenant(self):
        stack = engine("fair", max_num_seqs=1)
        stack.add(*(new_request(i, [i], tenant="crowd", max_total_tokens=4) for i in range(30)))
        for _ in range(8):
            stack.step()
        stack.add(new_request(99, [5], tenant="one", max_total_tokens=4))
        stack.run()
        assert starts(stack).index(99) <= 4

    def test_an_idle_tenant_saves_nothing_up(self):
        stack = engine("fair", max_num_seqs=1)
        stack.add(*(new_request(i, [i], tenant="busy", max_total_tokens=4) for i in range(10)))
        stack.run()
        late = [new_request(10 + i, [i], tenant=t, max_total_tokens=4) for i, t in enumerate(["idle", "busy"] * 5)]
        stack.add(*late)
        stack.run()
        order = [(request_id - 10) % 2 for request_id in starts(stack)[10:]]
        assert order.count(0) == 5
        assert max(order[:6].count(0), order[:6].count(1)) <= 4, "they take turns"

    def test_priority_orders_inside_a_tenant_only(self):
        stack = engine("fair", max_num_seqs=1)
        for request_id, tenant, priority in ((0, "a", 5), (1, "a", 0), (2, "b", 9)):
            stack.add(new_request(request_id, [1], tenant=tenant, priority=priority, max_total_tokens=3))
        stack.run()
        assert starts(stack) == [1, 2, 0]

    def test_accounts_of_tenants_that_come_once_are_forgotten(self):
        policy = FairShares({})
        for index in range(3 * MAX_TENANTS_KEPT):
            request = new_request(index, [1], tenant=str(index))
            policy.wake(request.tenant)
            policy.admit(request, 8)
            policy.end(request)
        assert len(policy._tags) <= 2 * MAX_TENANTS_KEPT + 1
        assert not policy._charged

    def test_all_end_with_the_tenants_texts_intact(self):
        chance = random.Random(3)
        stack = engine("fair", num_blocks=9, max_num_seqs=4)
        requests = [
            new_request(i, [chance.randrange(97) for _ in range(chance.randrange(1, 12))], tenant=chance.choice("abc"))
            for i in range(40)
        ]
        stack.add(*requests)
        stack.run()
        assert {r.finish_reason for r in requests} == {FinishReason.LENGTH}


class TestDeadlines:
    @pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
    def test_the_earlier_deadline_goes_first(self, policy):
        stack = engine(policy, max_num_seqs=1)
        stack.add(*(new_request(i, [1], deadline_s=d) for i, d in enumerate((None, 9.0, 5.0, None))))
        stack.run()
        assert starts(stack) == [2, 1, 0, 3]

    def test_priority_comes_before_deadline(self):
        stack = engine("priority", max_num_seqs=1)
        stack.add(new_request(0, [1], deadline_s=1.0, priority=1), new_request(1, [1], priority=0))
        stack.run()
        assert starts(stack) == [1, 0]

    def test_who_has_no_deadline_is_not_put_off_for_ever(self):
        """A stream of urgent requests fills the only place; the patient one starts after its patience."""
        stack = engine(max_num_seqs=1)
        patient = new_request(0, [1])
        stack.add(patient)
        number = 0
        while not starts(stack) or 0 not in starts(stack):
            number += 1
            stack.add(new_request(number, [2], max_total_tokens=2, deadline_s=stack.now_s + 10))
            stack.step()
            stack.now_s += 1
            assert stack.now_s <= PATIENCE_S + 2
        assert number > 15, "urgent ones went first for a while"

    @pytest.mark.parametrize("is_running", [True, False])
    def test_past_its_deadline_a_request_ends_keeps_its_tokens_and_says_why(self, is_running):
        stack = engine(max_num_seqs=1)
        first, second = new_request(0, [1], max_total_tokens=60), new_request(1, [2], max_total_tokens=60)
        victim, other = (first, second) if is_running else (second, first)
        victim.deadline_s = 100.0
        stack.scheduler.add(first)
        for _ in range(3):
            stack.step()
        stack.scheduler.add(second)
        stack.now_s = 100.5
        num_tokens = victim.num_tokens
        updates = stack.step()
        assert (victim, []) in [(u.request, u.new_token_ids) for u in updates]
        assert (victim.finish_reason, victim.num_tokens) == (FinishReason.ABORT, num_tokens)
        assert "0.500 s" in victim.error
        stack.run()
        assert other.finish_reason is FinishReason.LENGTH
        assert stack.num_owned == (0,)

    def test_the_last_request_to_miss_its_deadline_is_still_reported(self):
        stack = engine()
        request = new_request(0, [1], deadline_s=1.0)
        stack.add(request)
        stack.now_s = 2.0
        (update,) = stack.step()
        assert (update.request, request.finished) == (request, True)
        assert not stack.scheduler.has_requests()
        assert stack.scheduler.schedule() is None

    def test_deadlines_of_finished_requests_are_forgotten(self):
        stack = engine()
        for request_id in range(300):
            stack.add(new_request(request_id, [1], max_total_tokens=2, deadline_s=1e9))
            stack.step()
        assert len(stack.scheduler._requests._deadlines._heap) < 100
