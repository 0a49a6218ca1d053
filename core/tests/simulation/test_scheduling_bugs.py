"""Bugs of the scheduler, planted as `planted_bugs` says: each is noticed."""

from dataclasses import replace

import pytest

from simulation.planted_bugs import assert_noticed, bugs_of
from zif.contract import RequestStatus
from zif.scheduling import admission, lifecycle, planner, scheduler
from zif.scheduling.deadlines import Deadlines
from zif.scheduling.lifecycle import Lifecycle
from zif.scheduling.queue import RequestQueue
from zif.scheduling.scheduler import TokenBudgetScheduler
from zif.scheduling.trials import Trials
from zif.simulation import SimulatedRunner

pytestmark = pytest.mark.slow


def abort_of_a_preempted_request_leaks_its_place(monkeypatch):
    original = TokenBudgetScheduler.finish

    def finish(self, request_id, reason):
        request = self._requests.requests.get(request_id)
        preempted = request is not None and request.status is RequestStatus.PREEMPTED
        ended = original(self, request_id, reason)
        if preempted:
            self._requests.waiting.put_back(request)
        return ended

    monkeypatch.setattr(TokenBudgetScheduler, "finish", finish)


def abort_of_a_running_request_leaves_it_running(monkeypatch):
    original = TokenBudgetScheduler.finish

    def finish(self, request_id, reason):
        running = list(self._requests.running)
        ended = original(self, request_id, reason)
        self._requests.running = running
        return ended

    monkeypatch.setattr(TokenBudgetScheduler, "finish", finish)


def the_runner_is_not_told_of_released_requests(monkeypatch):
    original = SimulatedRunner.submit
    monkeypatch.setattr(SimulatedRunner, "submit", lambda self, step: original(self, replace(step, released=[])))


def the_runner_is_not_told_of_new_blocks(monkeypatch):
    monkeypatch.setattr(planner, "append_block_updates", lambda plan, request, held: None)


def chunks_sample_before_the_prompt_ends(monkeypatch):
    original = planner.append_row

    def append_row(draft, request, end):
        original(draft, request, end)
        draft.plan.samples[-1] = True

    monkeypatch.setattr(planner, "append_row", append_row)


def the_first_request_is_preempted_instead_of_the_last(monkeypatch):
    monkeypatch.setattr(lifecycle, "_order", lambda request: tuple(-key for key in request.order))


def a_request_that_was_passed_is_forgotten(monkeypatch):
    original = RequestQueue.put_back

    def put_back(self, request):
        if not request.num_bypasses:
            original(self, request)

    monkeypatch.setattr(RequestQueue, "put_back", put_back)


def _with_limits(monkeypatch, **changes):
    original = scheduler.step_limits

    def step_limits(config, constraints):
        limits = original(config, constraints)
        return replace(limits, **{name: change(getattr(limits, name)) for name, change in changes.items()})

    monkeypatch.setattr(scheduler, "step_limits", step_limits)


def the_token_budget_is_exceeded(monkeypatch):
    _with_limits(monkeypatch, max_tokens=lambda n: n + 3)


def one_request_too_many_runs(monkeypatch):
    _with_limits(monkeypatch, max_requests=lambda n: n + 1)


def alignment_is_ignored(monkeypatch):
    _with_limits(monkeypatch, token_alignment=lambda n: 1)


def prompts_are_not_separated(monkeypatch):
    _with_limits(monkeypatch, separate_prefill=lambda wanted: False)


def any_number_of_prompts_is_computed_in_part(monkeypatch):
    _with_limits(monkeypatch, max_partial_prefills=lambda n: 99)


def deadlines_are_not_watched(monkeypatch):
    monkeypatch.setattr(Deadlines, "pop_passed", lambda self, now_s: [])


def requests_end_before_their_deadline(monkeypatch):
    original = Deadlines.pop_passed
    monkeypatch.setattr(Deadlines, "pop_passed", lambda self, now_s: original(self, now_s + 0.1))


def stale_result_applied(monkeypatch):
    original = TokenBudgetScheduler.update
    monkeypatch.setattr(
        TokenBudgetScheduler,
        "update",
        lambda self, plan, result: original(self, plan, replace(result, step=plan.step)),
    )


def result_applied_twice(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        in_flight = self._requests.in_flight
        if result.step == plan.step and plan.step not in in_flight:
            in_flight.appendleft(plan.step)
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def what_a_faulty_step_computed_is_found(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        for request_id, num_tokens in zip(plan.request_ids, plan.num_tokens, strict=True):
            request = self._requests.requests.get(request_id)
            if request_id in result.faults and request and request.block_ids:
                request.num_computed_tokens += num_tokens
                self._blocks.commit(request)
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def a_fault_of_one_request_ends_all(monkeypatch):
    original = TokenBudgetScheduler.update

    def update(self, plan, result):
        if result.faults:
            result.faults.update(dict.fromkeys(plan.request_ids, "another one failed"))
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "update", update)


def _with_request(monkeypatch, name, change):
    original = TokenBudgetScheduler._append_tokens

    def append_tokens(self, request, sampled):
        value = getattr(request, name)
        setattr(request, name, change(value))
        try:
            return original(self, request, sampled)
        finally:
            setattr(request, name, value)

    monkeypatch.setattr(TokenBudgetScheduler, "_append_tokens", append_tokens)


def stop_tokens_are_ignored(monkeypatch):
    _with_request(monkeypatch, "stop_ids", lambda ids: frozenset())


def one_token_too_many_is_generated(monkeypatch):
    _with_request(monkeypatch, "max_total_tokens", lambda n: n + 1)


def results_are_applied_in_any_order(monkeypatch):
    original = TokenBudgetScheduler._is_due

    def is_due(self, plan, result):
        self._requests.in_flight = type(self._requests.in_flight)(
            sorted(self._requests.in_flight, key=lambda step: step != plan.step)
        )
        return original(self, plan, result)

    monkeypatch.setattr(TokenBudgetScheduler, "_is_due", is_due)


def blocks_are_returned_while_a_step_writes_to_them(monkeypatch):
    original = Lifecycle.end

    def end(self, request, reason):
        request.num_planned_tokens = request.num_computed_tokens
        original(self, request, reason)

    monkeypatch.setattr(Lifecycle, "end", end)


def blocks_held_for_a_step_are_never_returned(monkeypatch):
    monkeypatch.setattr(Lifecycle, "step_applied", lambda self, step: None)


def steps_under_way_are_forgotten_when_a_request_is_preempted(monkeypatch):
    original = planner.StepPlanner._make_room

    def make_room(self, draft, request, num_tokens):
        in_flight, self._requests.in_flight = self._requests.in_flight, ()
        try:
            return original(self, draft, request, num_tokens)
        finally:
            self._requests.in_flight = in_flight

    monkeypatch.setattr(planner.StepPlanner, "_make_room", make_room)


def tokens_that_steps_under_way_sample_are_not_counted(monkeypatch):
    original = planner.append_single_rows

    def append_single_rows(plan, requests):
        original(plan, requests)
        for request in requests:
            request.num_pending_tokens = 0

    monkeypatch.setattr(planner, "append_single_rows", append_single_rows)


def refused_guesses_count_as_computed(monkeypatch):
    original = TokenBudgetScheduler._accept

    def accept(self, request, num_tokens, sampled):
        refused = num_tokens - len(sampled)
        new = original(self, request, num_tokens, sampled)
        if refused and not request.finished:
            request.num_computed_tokens = request.num_planned_tokens = len(request.token_ids)
        return new

    monkeypatch.setattr(TokenBudgetScheduler, "_accept", accept)


def guesses_follow_an_unknown_token(monkeypatch):
    original = planner.StepPlanner._guess

    def guess(self, draft, request, max_tokens):
        pending, request.num_pending_tokens = request.num_pending_tokens, 0
        try:
            return original(self, draft, request, max_tokens)
        finally:
            request.num_pending_tokens = pending

    monkeypatch.setattr(planner.StepPlanner, "_guess", guess)


def too_many_guesses_are_planned(monkeypatch):
    _with_limits(monkeypatch, max_draft_tokens=lambda n: n + 1 if n else n)


def samples_share_the_prompt_of_a_faulty_sibling(monkeypatch):
    def holds_prompt(request):
        return bool(request.block_ids) and request.num_computed_tokens >= request.num_prompt_tokens

    monkeypatch.setattr(admission, "_holds_prompt", holds_prompt)


def any_request_of_a_step_that_raised_is_blamed(monkeypatch):
    original = Trials.blame
    monkeypatch.setattr(Trials, "blame", lambda self, ends, *, alone: original(self, ends, alone=True))


def requests_keep_their_place_when_a_step_raises(monkeypatch):
    original = TokenBudgetScheduler.abandon

    def abandon(self, plans, error):
        started_over = Lifecycle.start_over
        Lifecycle.start_over = lambda requests, request: None
        try:
            return original(self, plans, error)
        finally:
            Lifecycle.start_over = started_over

    monkeypatch.setattr(TokenBudgetScheduler, "abandon", abandon)


def room_that_a_plan_that_raised_should_make_is_forgotten(monkeypatch):
    monkeypatch.setattr(scheduler, "_room_made", lambda plans: None)


BUGS = bugs_of(globals())


def test_there_are_enough_bugs():
    assert len(BUGS) >= 25


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_noticed(monkeypatch, plant):
    assert_noticed(monkeypatch, plant)
