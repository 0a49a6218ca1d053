"""Rows with guessed tokens: what is planned, what is kept, what goes back, in groups of every kind."""

import pytest

from support.control_plane import (
    VOCAB_SIZE,
    Engine,
    chunked,
    cut,
    expected_output,
    full,
    latent,
    new_request,
    recurrent,
    sliding,
)
from zif.contract import FinishReason, SchedulerConstraints
from zif.null.runner import expected_token

KINDS = {
    "full": (full(),),
    "latent": (latent(2),),
    "sliding": (sliding(5),),
    "chunked": (chunked(8),),
    "recurrent": (recurrent(),),
    "hybrid": (full(), recurrent(8)),
    "all": (full(), sliding(5), chunked(8), recurrent(8)),
}


def continuation(request, specs, count):
    tokens = request.token_ids.copy()
    for _ in range(count):
        tokens.append(expected_token(tokens, specs, VOCAB_SIZE))
    return tokens[request.num_tokens :]


def engine(specs, num_slabs=40, **limits):
    return Engine(cut(specs, num_slabs * len(specs)), limits={"max_draft_tokens": 4} | limits)


def guessing(stack, request, right, wrong=0):
    """Set guesses of which the first `right` are right."""
    guesses = continuation(request, stack.specs, right + wrong)
    request.draft_token_ids = guesses[:right] + [(token + 1) % VOCAB_SIZE for token in guesses[right:]]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("right", range(5))
def test_any_number_of_right_guesses_gives_the_same_text(kinds, right):
    specs = KINDS[kinds]
    stack = engine(specs)
    requests = [new_request(i, [i + 1, 7, 9][: 1 + i], max_total_tokens=40 + i) for i in range(3)]
    stack.add(*requests)
    while stack.scheduler.has_requests():
        for request in requests[:2]:
            if request.num_output_tokens:
                guessing(stack, request, right, wrong=4 - right)
        stack.step()
    for request in requests:
        assert request.finish_reason is FinishReason.LENGTH
        assert request.output_token_ids == expected_output(request, specs)
    assert requests[0].num_drafted_tokens > 0
    assert bool(requests[0].num_accepted_tokens) == bool(right)
    assert requests[2].num_drafted_tokens == 0
    assert stack.num_owned == (0,) * len(specs)


def test_right_guesses_save_steps():
    stack = engine((full(),))
    request = new_request(0, [1, 2, 3], max_total_tokens=23)
    stack.add(request)
    stack.step()
    while stack.scheduler.has_requests():
        guessing(stack, request, 4)
        stack.step()
    assert [len(plan.request_ids) for plan in stack.plans] == [1] * 5 + [0]
    assert (request.num_drafted_tokens, request.num_accepted_tokens) == (15, 15)


def test_blocks_that_only_refused_guesses_reached_go_back():
    stack = engine((full(2),))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    stack.add(request)
    stack.step()
    assert stack.num_owned == (2,)
    guessing(stack, request, 0, wrong=4)
    plan = stack.scheduler.schedule()
    assert stack.num_owned == (4,)
    stack.scheduler.update(plan, stack.runner.submit(plan).result())
    assert (request.num_computed_tokens, stack.num_owned) == (4, (2,))


def test_a_state_stays_when_a_guess_is_refused_and_its_tokens_are_computed_again():
    stack = engine((full(), recurrent()))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    stack.add(request)
    stack.step()
    guessing(stack, request, 1, wrong=2)
    stack.step()
    assert (request.num_computed_tokens, request.num_tokens) == (3, 6)
    guessing(stack, request, 3)
    stack.step()
    assert stack.plans[-1].num_tokens == [3], "no guess follows tokens that must be computed again"
    assert stack.plans[-1].drafts == {}
    assert (request.num_computed_tokens, request.num_tokens) == (6, 7)


def test_guesses_are_cut_to_the_budget_and_to_what_the_request_may_say():
    stack = Engine(cut((full(),), 40), budget=3, limits={"max_draft_tokens": 4})
    request = new_request(0, [1, 2, 3], max_total_tokens=7)
    stack.add(request)
    stack.step()
    guessing(stack, request, 4)
    stack.step()
    assert stack.plans[-1].num_tokens == [3]
    assert request.finish_reason is FinishReason.LENGTH
    stack = engine((full(),))
    request = new_request(1, [1, 2, 3], max_total_tokens=6)
    stack.add(request)
    stack.step()
    guessing(stack, request, 4)
    stack.step()
    assert stack.plans[-1].num_tokens == [2]
    assert request.num_tokens == 6


def test_a_stop_token_among_the_guesses_ends_the_request_there():
    stack = engine((full(), recurrent()))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    third = continuation(request, stack.specs, 3)[-1]
    request.stop_ids = frozenset([third])
    stack.add(request)
    stack.step()
    guessing(stack, request, 4)
    stack.step()
    assert request.finish_reason is FinishReason.STOP
    assert (request.num_output_tokens, request.output_token_ids[-1]) == (3, third)
    assert stack.num_owned == (0, 0)


def test_without_room_for_guesses_the_request_goes_on_without_and_nobody_loses_blocks():
    stack = Engine(cut((full(),), 4), caching=False, limits={"max_draft_tokens": 4})
    first, second = new_request(0, [1] * 7, max_total_tokens=9), new_request(1, [2] * 7, max_total_tokens=9)
    stack.add(first, second)
    stack.step()
    guessing(stack, first, 4)
    stack.step()
    assert stack.plans[-1].drafts == {}
    assert stack.plans[-1].request_ids == [0, 1]
    assert second.num_preemptions == 0


def test_guesses_do_not_follow_a_token_that_is_not_known_yet():
    stack = engine((full(),))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    stack.add(request)
    plan = stack.scheduler.schedule()
    request.draft_token_ids = [5, 6]
    ahead = stack.scheduler.schedule()
    assert (ahead.num_tokens, ahead.drafts) == ([1], {})
    for step in (plan, ahead):
        stack.scheduler.update(step, stack.runner.submit(step).result())
    assert request.output_token_ids == expected_output(request, stack.specs)


def test_a_row_with_guesses_is_not_followed_before_its_result():
    stack = engine((full(),))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    stack.add(request)
    stack.step()
    guessing(stack, request, 2)
    plan = stack.scheduler.schedule()
    assert plan.num_tokens == [3]
    assert stack.scheduler.schedule() is None


def test_an_abort_gives_spare_states_back_after_the_step():
    stack = engine((full(), recurrent()))
    request = new_request(0, [1, 2, 3], max_total_tokens=30)
    stack.add(request)
    stack.step()
    guessing(stack, request, 2)
    plan = stack.scheduler.schedule()
    assert stack.num_owned == (2, 2)
    stack.scheduler.finish(0, FinishReason.ABORT)
    stack.blocks.check_integrity(stack.scheduler.holders())
    assert stack.scheduler.update(plan, stack.runner.submit(plan).result()) == []
    assert stack.num_owned == (0, 0)


def test_a_platform_that_separates_prompts_computes_refused_states_with_the_prompts():
    stack = Engine(
        cut((full(), recurrent()), 80),
        budget=2,
        limits={"max_draft_tokens": 4},
        constraints=SchedulerConstraints(separate_prefill=True),
    )
    requests = [new_request(i, [i + 1, 2], max_total_tokens=20) for i in range(3)]
    stack.add(*requests)
    while stack.scheduler.has_requests():
        for request in requests:
            if request.num_output_tokens:
                guessing(stack, request, 0, wrong=1)
        stack.step()
    for request in requests:
        assert request.output_token_ids == expected_output(request, stack.specs)
