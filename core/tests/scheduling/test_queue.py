"""The waiting line against a sorted list."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.control_plane import new_request
from zif.errors import ConfigError
from zif.scheduling.queue import RequestQueue, order_key


@pytest.mark.parametrize(
    ("policy", "order"), [("fcfs", [0, 1, 2, 3]), ("priority", [2, 1, 3, 0])], ids=["fcfs", "priority"]
)
def test_policies_order_the_line(policy, order):
    queue = RequestQueue(order_key(policy))
    for request_id, priority in ((3, 1), (0, 5), (2, -1), (1, 1)):
        queue.push(new_request(request_id, [1], priority=priority))
    assert [queue.pop().request_id for _ in range(4)] == order


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'sjf'.*fcfs, priority"):
        order_key("sjf")


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.integers(0, 9)), max_size=40))
def test_any_order_of_calls_behaves_like_a_sorted_list(calls):
    queue, model = RequestQueue(order_key("priority")), []
    for index, (call, number) in enumerate(calls):
        if call == "push":
            model.append(new_request(index, [1], priority=number))
            queue.push(model[-1])
        elif call == "pop" and model:
            first = min(model, key=order_key("priority"))
            model.remove(first)
            assert queue.pop() is first
        elif call == "discard" and model:
            queue.discard(model.pop(number % len(model)))
        assert len(queue) == len(model)
        assert queue.peek() is min(model, key=order_key("priority"), default=None)


def test_a_request_that_waits_again_keeps_its_place():
    queue = RequestQueue(order_key("fcfs"))
    first, second = new_request(0, [1]), new_request(1, [1])
    queue.push(first)
    queue.push(second)
    assert queue.pop() is first
    queue.push(first)
    assert queue.peek() is first


def test_nothing_pops_from_an_empty_line():
    with pytest.raises(AssertionError, match="empty"):
        RequestQueue(order_key("fcfs")).pop()
