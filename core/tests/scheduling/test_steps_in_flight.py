"""Steps planned while earlier ones are under way: late results, held blocks, rows that turn out void."""

from collections import deque

import pytest

from support.control_plane import (
    VOCAB_SIZE,
    Engine,
    chunked,
    cut,
    expected_output,
    full,
    new_request,
    recurrent,
    sliding,
)
from zif.contract import FinishReason, RequestStatus, StepPlan, StepResult
from zif.errors import ContractError
from zif.null.runner import expected_token


class Pipeline:
    """An engine that keeps up to `depth` steps under way."""

    def __init__(self, stack: Engine, depth: int) -> None:
        self.stack = stack
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    def submit(self) -> StepPlan | None:
        plan = self.stack.scheduler.schedule()
        if plan is not None:
            self.in_flight.append((plan, self.stack.runner.submit(plan).result()))
        return plan

    def apply(self):
        updates = self.stack.scheduler.update(*self.in_flight.popleft())
        scheduler = self.stack.scheduler
        self.stack.blocks.check_integrity(scheduler.live_requests() + scheduler.holders())
        return updates

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            while len(self.in_flight) < self.depth and self.submit():
                pass
            if not self.in_flight:
                assert not self.stack.scheduler.has_requests()
                return
            self.apply()
        raise AssertionError(f"not done after {max_steps} steps")


KINDS = {
    "full": (full(),),
    "windows": (full(), sliding(5), chunked(8)),
    "states": (full(), recurrent()),
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("num_slabs", [14, 60])
def test_the_text_is_the_same_however_many_steps_are_under_way(kinds, depth, num_slabs):
    specs = KINDS[kinds]
    stack = Engine(cut(specs, num_slabs * len(specs)), budget=7)
    requests = [new_request(i, [i, *range(9)][: 3 + 2 * i], max_total_tokens=20 + i) for i in range(6)]
    stack.add(*requests)
    Pipeline(stack, depth).run()
    for request in requests:
        assert request.finish_reason is FinishReason.LENGTH
        assert request.num_tokens == request.max_total_tokens
        assert request.output_token_ids == expected_output(request, specs)
    assert stack.num_owned == (0,) * len(specs)


def test_a_decode_is_planned_before_its_token_is_known():
    stack = Engine(cut((full(),), 20))
    pipeline = Pipeline(stack, 2)
    request = new_request(0, [1, 2, 3], max_total_tokens=9)
    stack.add(request)
    assert pipeline.submit().num_computed == [0]
    ahead = pipeline.submit()
    assert (ahead.num_computed, ahead.num_tokens, ahead.samples) == ([3], [1], [True])
    assert (request.num_tokens, request.num_computed_tokens, request.num_planned_tokens) == (3, 0, 4)
    pipeline.apply()
    assert (request.num_tokens, request.num_computed_tokens, request.num_pending_tokens) == (4, 3, 1)


def test_no_row_is_planned_beyond_the_last_token():
    stack = Engine(cut((full(),), 20))
    pipeline = Pipeline(stack, 9)
    stack.add(new_request(0, [1, 2, 3], max_total_tokens=5))
    assert [plan.num_computed for plan in iter(pipeline.submit, None)] == [[0], [3]]


def test_a_row_planned_before_a_stop_token_is_void():
    stack = Engine(cut((full(),), 20))
    pipeline = Pipeline(stack, 2)
    first = expected_token([1, 2, 3], stack.specs, VOCAB_SIZE)
    request = new_request(0, [1, 2, 3], stop_ids=frozenset([first]))
    stack.add(request)
    pipeline.run()
    assert request.output_token_ids == [first]
    assert request.finish_reason is FinishReason.STOP
    assert stack.num_owned == (0,)


def test_results_out_of_order_are_refused_and_change_nothing():
    stack = Engine(cut((full(),), 20))
    pipeline = Pipeline(stack, 2)
    request = new_request(0, [1, 2, 3])
    stack.add(request)
    pipeline.submit(), pipeline.submit()
    with pytest.raises(ContractError, match="step 1 is to be applied before step 0"):
        stack.scheduler.update(*pipeline.in_flight[1])
    assert (request.num_tokens, request.num_computed_tokens, request.num_planned_tokens) == (3, 0, 4)
    pipeline.run()
    assert request.output_token_ids == expected_output(request, stack.specs)


def test_blocks_of_an_aborted_request_are_held_until_its_steps_are_applied():
    stack = Engine(cut((full(),), 3), caching=False)
    pipeline = Pipeline(stack, 2)
    doomed, waiting = new_request(0, [1] * 8), new_request(1, [2] * 11, max_total_tokens=12)
    stack.add(doomed, waiting)
    pipeline.submit()
    assert stack.scheduler.finish(0, FinishReason.ABORT) is doomed
    assert stack.scheduler.holders() == [doomed]
    assert stack.num_owned == (2,)
    assert pipeline.submit().request_ids == [], "the blocks are free only when the step under way is applied"
    pipeline.apply()
    assert stack.num_owned == (0,)
    assert stack.scheduler.holders() == []
    pipeline.run()
    assert waiting.output_token_ids == expected_output(waiting, stack.specs)


def test_nobody_is_preempted_while_a_step_is_under_way():
    stack = Engine(cut((full(),), 4), caching=False)
    pipeline = Pipeline(stack, 2)
    first, second = new_request(0, [1] * 7), new_request(1, [2] * 7)
    stack.add(first, second)
    pipeline.submit()
    assert pipeline.submit().request_ids == [0, 1]
    pipeline.apply()
    assert pipeline.submit() is None, "a fifth block is needed"
    assert second.status is RequestStatus.RUNNING
    pipeline.apply()
    assert pipeline.submit().request_ids == [0]
    assert second.status is RequestStatus.PREEMPTED
    pipeline.run()
    for request in (first, second):
        assert request.output_token_ids == expected_output(request, stack.specs)


def test_forgotten_steps_hold_nothing_and_leave_no_trace():
    stack = Engine(cut((full(),), 20), caching=False)
    pipeline = Pipeline(stack, 3)
    stack.add(new_request(0, [1] * 8), new_request(1, [2] * 8))
    pipeline.submit(), pipeline.submit()
    for request_id in (0, 1):
        stack.scheduler.finish(request_id, FinishReason.ERROR)
    assert stack.num_owned == (6,)
    stack.scheduler.forget_steps()
    assert stack.num_owned == (0,)
