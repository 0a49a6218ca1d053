"""Drafts on the null platform: whatever is guessed, the text is the oracle's, and right guesses save steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.control_plane import KINDS, VOCAB_SIZE, cut, full, null_model, recurrent, sliding, spec_of
from support.draft_steps import DraftedRequest, HandMadeSteps
from zif.contract import BlockUpdate, EngineConfig, KVSpec, RequestStart, StepPlan
from zif.null.runner import NullRunner, expected_token

MAX_TOKENS = 48


def steps_of(specs: tuple[KVSpec, ...], num_slabs: int = 600) -> HandMadeSteps:
    runner = NullRunner(EngineConfig(MAX_TOKENS, 8, 64))
    runner.load(null_model(specs), lambda done, total: None)
    arena = cut(specs, num_slabs)
    runner.start(arena)
    return HandMadeSteps(runner, arena, MAX_TOKENS)


def text_after(prompt: list[int], specs: tuple[KVSpec, ...], length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append(expected_token(tokens, specs, VOCAB_SIZE))
    return tokens


def test_drafts_are_verified() -> None:
    assert steps_of((full(),)).runner.verifies_drafts


@pytest.mark.parametrize("specs", [(full(),), (sliding(3),), (recurrent(),), (recurrent(2), full(8), sliding(5, 2))])
def test_right_guesses_are_accepted_and_the_token_after_them_comes_along(specs: tuple[KVSpec, ...]) -> None:
    steps = steps_of(specs)
    request = steps.add(0, DraftedRequest([5, 6, 7]))
    text = text_after([5, 6, 7], specs, 40)
    steps.step()
    for num_guesses in (3, 5, 0, 1, 9):
        known = len(request.token_ids)
        result = steps.step({0: text[known : known + num_guesses]})
        assert result.sampled == [text[known : known + num_guesses + 1]]
        assert request.num_computed == len(request.token_ids) - 1
    steps.step()
    assert request.token_ids == text[: len(request.token_ids)]


@pytest.mark.parametrize("num_right", [0, 1, 3])
@pytest.mark.parametrize("specs", [(full(),), (sliding(3),), (recurrent(),), (recurrent(2), full(8), sliding(5, 2))])
def test_what_follows_a_wrong_guess_is_refused(specs: tuple[KVSpec, ...], num_right: int) -> None:
    steps = steps_of(specs)
    request = steps.add(0, DraftedRequest([5, 6, 7]))
    text = text_after([5, 6, 7], specs, 40)
    steps.step()
    for _ in range(4):
        known = len(request.token_ids)
        guesses = text[known : known + 4]
        guesses[num_right] = (guesses[num_right] + 1) % VOCAB_SIZE
        assert steps.step({0: guesses}).sampled == [text[known : known + num_right + 1]]
    steps.step()
    assert request.token_ids == text[: len(request.token_ids)]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 9), st.sampled_from([1, 2, 4, 8])),
        min_size=1,
        max_size=3,
    ),
    st.data(),
)
def test_any_guesses_in_any_batch_keep_the_text(groups: list[tuple[str, int, int]], data: st.DataObject) -> None:
    specs = tuple(spec_of(*group) for group in groups)
    steps = steps_of(specs)
    prompts = data.draw(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=12), min_size=1, max_size=3))
    texts = {i: text_after(prompt, specs, MAX_TOKENS) for i, prompt in enumerate(prompts)}
    for i, prompt in enumerate(prompts):
        steps.add(i, DraftedRequest(list(prompt)))
    for _ in range(6):
        drafts, chunks = {}, {}
        for i, request in steps.requests.items():
            if data.draw(st.booleans()):
                known = len(request.token_ids)
                guesses = texts[i][known : known + data.draw(st.integers(0, 3))]
                guesses += data.draw(st.lists(st.integers(0, 96), max_size=2))
                drafts[i] = guesses[: max(0, MAX_TOKENS - known - 1)]
            else:
                chunks[i] = data.draw(st.integers(1, 5))
        steps.step(drafts, chunks)
    for i, request in steps.requests.items():
        assert request.token_ids == texts[i][: len(request.token_ids)]


def test_a_block_update_replaces_what_refused_guesses_gave_back() -> None:
    steps = steps_of((full(),))
    first = steps.add(0, DraftedRequest([5, 6, 7]))
    texts = [text_after(prompt, (full(),), 9) for prompt in ([5, 6, 7], [8, 9])]
    steps.step()
    # From block 1 on the first request gets other blocks, and a second request those.
    released, first_block, other = first.tables[0][1:3], 40, 42
    start = RequestStart(1, [8, 9], 2, ([first_block, *released],), first.sampling, 0)
    update = BlockUpdate(0, 0, 1, [other, other + 1])
    columns = {"started": [start], "block_updates": [update]}
    for step in range(4):
        computed, num_tokens = ([3, 0], [1, 2]) if not step else ([3 + step, 1 + step], [1, 1])
        plan = StepPlan(step + 1, [0, 1], computed, num_tokens, [True, True], **columns)  # type: ignore[arg-type]
        columns = {}
        assert steps.runner.submit(plan).result().sampled == [[texts[0][4 + step]], [texts[1][2 + step]]]


def test_blocks_follow_those_that_are_known() -> None:
    steps = steps_of((full(),))
    request = steps.add(0, DraftedRequest([5, 6, 7]))
    steps.step()
    gap = BlockUpdate(0, 0, len(request.tables[0]) + 1, [1])
    with pytest.raises(AssertionError, match="do not follow"):
        steps.runner.submit(StepPlan(1, block_updates=[gap]))
