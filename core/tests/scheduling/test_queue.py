"""The waiting line against a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.control_plane import new_request
from zif.contract import EngineConfig
from zif.errors import ConfigError
from zif.scheduling.policies import policy_of
from zif.scheduling.queue import RequestQueue


def policy(name, **options):
    return policy_of(EngineConfig(64, 8, 16, scheduling_policy=name, **options))


@pytest.mark.parametrize(
    ("name", "order"),
    [("fcfs", [0, 1, 2, 3]), ("priority", [2, 1, 3, 0]), ("fair", [2, 1, 3, 0])],
    ids=["fcfs", "priority", "fair"],
)
def test_policies_order_the_line(name, order):
    queue = RequestQueue(policy(name))
    for request_id, priority in ((3, 1), (0, 5), (2, -1), (1, 1)):
        queue.push(new_request(request_id, [1], priority=priority))
    assert [queue.pop().request_id for _ in range(4)] == order


@pytest.mark.parametrize("name", ["fcfs", "priority", "fair"])
def test_among_equals_the_one_that_is_due_first(name):
    queue = RequestQueue(policy(name))
    for request_id, due_s in enumerate((9.0, 3.0, 5.0)):
        queue.push(new_request(request_id, [1], due_s=due_s))
    assert [queue.pop().request_id for _ in range(3)] == [1, 2, 0]


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'sjf'.*fcfs, priority, fair"):
        policy("sjf")


def test_weights_without_fair_shares_are_refused():
    with pytest.raises(ConfigError, match=r"tenant_weights=.*'priority'"):
        policy("priority", tenant_weights=(("a", 2),))


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard", "resume"]), st.integers(0, 9)), max_size=60))
def test_any_order_of_calls_behaves_like_a_sorted_list(calls):
    queue, model, taken = RequestQueue(policy("priority")), [], []
    for index, (call, number) in enumerate(calls):
        if call == "push":
            model.append(new_request(index, [1], priority=number))
            queue.push(model[-1])
        elif call == "pop" and model:
            first = min(model, key=queue.order_of)
            model.remove(first)
            assert queue.pop() is first
            first.order = queue.order_of(first)
            taken.append(first)
        elif call == "resume" and taken:
            model.append(taken.pop(number % len(taken)))
            queue.push(model[-1])
        elif call == "discard" and model:
            queue.discard(model.pop(number % len(model)))
        assert len(queue) == len(model)
        assert queue.peek() is min(model, key=queue.order_of, default=None)


@given(st.lists(st.tuples(st.sampled_from(["push", "admit", "end", "discard"]), st.integers(0, 9)), max_size=80))
def test_lines_of_tenants_stand_by_their_tags_as_these_rise_and_fall(calls):
    shares = policy("fair")
    queue, model, running = RequestQueue(shares), [], []
    for index, (call, number) in enumerate(calls):
        if call == "push":
            model.append(new_request(index, [1], tenant="abc"[number % 3], priority=number // 3))
            queue.push(model[-1])
        elif call == "admit" and model:
            first = queue.pop()
            first.order = shares.tag(first.tenant), *shares.urgency(first)
            model.remove(first)
            shares.admit(first, 10 * number)
            running.append(first)
        elif call == "end" and running:
            ended = running.pop(number % len(running))
            shares.end(ended)
            queue.reconsider(ended.tenant)
        elif call == "discard" and model:
            queue.discard(model.pop(number % len(model)))
        assert queue.peek() is min(model, key=queue.order_of, default=None)


def test_a_request_that_waits_again_keeps_its_place():
    queue = RequestQueue(policy("fcfs"))
    first, second = new_request(0, [1]), new_request(1, [1])
    queue.push(first)
    queue.push(second)
    assert queue.pop() is first
    queue.push(first)
    assert queue.peek() is first


def test_discarding_one_that_does_not_wait_changes_nothing():
    queue = RequestQueue(policy("fcfs"))
    waiting = new_request(0, [1])
    queue.push(waiting)
    queue.discard(new_request(1, [1]))
    assert (len(queue), queue.peek()) == (1, waiting)


def test_aborted_requests_are_not_kept():
    """The first one stays, so that nothing behind it surfaces."""
    queue = RequestQueue(policy("fcfs"))
    queue.push(new_request(0, [1]))
    for request_id in range(1, 500):
        request = new_request(request_id, [1])
        queue.push(request)
        queue.discard(request)
    assert sum(len(line.heap) for line in queue._lines.values()) < 32


def test_nothing_pops_from_an_empty_line():
    with pytest.raises(AssertionError, match="empty"):
        RequestQueue(policy("fcfs")).pop()
