"""Guesses from repetitions: the longest known suffix is looked up, and what followed it last is copied."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.checkpoints import build_checkpoint
from support.control_plane import new_request
from zif.contract import (
    EngineConfig,
    KVArena,
    ModelDescription,
    ModelRunner,
    Progress,
    RequestStatus,
    StepFuture,
    StepPlan,
)
from zif.engine.planning import plan_model
from zif.engine.proposers import MAX_NGRAM, MIN_NGRAM, DraftProposer, NgramProposer, make_proposer, set_drafts
from zif.errors import ConfigError
from zif.null.runner import NullRunner
from zif.settings import EngineSettings

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def naive_guesses(tokens: list[int], count: int, min_ngram: int, max_ngram: int) -> list[int]:
    """Scan the whole text for the last earlier occurrence of the longest suffix, then copy token by token."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if n < len(tokens) and tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)
                for _ in range(count):
                    text.append(text[len(text) - (len(tokens) - start - n)])
                return text[len(tokens) :]
    return []


@given(TOKENS, TOKENS, st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
def test_guesses_are_those_of_a_scan_however_the_text_grew(
    prompt: list[int], output: list[int], min_ngram: int, more: int, count: int
) -> None:
    proposer = NgramProposer(count, min_ngram, min_ngram + more)
    request = new_request(0, prompt)
    for token_id in [None, *output]:
        request.token_ids += [] if token_id is None else [token_id]
        if token_id != 2:  # Steps that sample several tokens ask once.
            expected = naive_guesses(request.token_ids, count, min_ngram, min_ngram + more)
            assert proposer.propose(request) == expected


@given(TOKENS, st.integers(1, 6))
def test_the_first_guess_followed_the_same_tokens_before(tokens: list[int], count: int) -> None:
    guesses = NgramProposer(count).propose(new_request(0, tokens))
    assert len(guesses) in (0, count)
    if guesses:
        found = [*tokens[-MIN_NGRAM:], guesses[0]]
        assert found in [tokens[i : i + len(found)] for i in range(len(tokens))]


def test_a_period_goes_on_beyond_the_end_of_the_text() -> None:
    assert NgramProposer(5).propose(new_request(0, [9, 1, 2, 3, 1, 2, 3, 1, 2])) == [3, 1, 2, 3, 1]


def test_the_longest_suffix_decides_and_then_the_last_occurrence() -> None:
    long_ago, lately = [1, 2, 3, 4, 50], [7, 3, 4, 60]
    assert NgramProposer(1).propose(new_request(0, [*long_ago, *lately, 1, 2, 3, 4])) == [50]
    assert NgramProposer(1).propose(new_request(0, [*long_ago, *lately, 8, 3, 4])) == [60]
    assert MIN_NGRAM == 2 < MAX_NGRAM


def test_requests_do_not_see_each_other_and_a_number_may_come_again_after_its_end() -> None:
    proposer = NgramProposer(2)
    first, second = new_request(0, [1, 2, 3, 1, 2]), new_request(1, [1, 2])
    assert proposer.propose(first) == [3, 1]
    assert proposer.propose(second) == []
    proposer.forget(first)
    proposer.forget(first)
    assert proposer.propose(new_request(0, [1, 2, 4, 1, 2])) == [4, 1]


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    proposer = NgramProposer(2)
    tracemalloc.start()
    try:
        for request_id in range(200):
            request = new_request(request_id, list(range(300)))
            proposer.propose(request)
            proposer.forget(request)
            if request_id == 20:
                before = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("options", [(0, 2, 4), (3, 0, 4), (3, 5, 4)])
def test_a_proposer_that_could_propose_nothing_is_refused(options: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"proposes nothing|must lie between"):
        NgramProposer(*options)


def test_guesses_are_for_requests_that_lack_one_token_and_wait_for_no_step() -> None:
    prompt, text = [1, 2, 3], [1, 2, 3, 1, 2]
    generating = new_request(0, prompt, num_planned_tokens=4)
    catching_up = new_request(1, prompt, num_planned_tokens=2, draft_token_ids=[7])
    ahead = new_request(2, prompt, num_planned_tokens=5, num_pending_tokens=1)
    for request in (generating, catching_up, ahead):
        request.token_ids[:] = text
    starting = new_request(3, text, num_planned_tokens=4)
    over = new_request(4, prompt, num_planned_tokens=4, status=RequestStatus.FINISHED)
    over.token_ids[:] = text
    requests = [generating, catching_up, ahead, starting, over]
    set_drafts(NgramProposer(2), requests)
    assert [request.draft_token_ids for request in requests] == [[3, 1], [], [], [], []]


class PlainRunner(ModelRunner):
    """A runner that has not heard of drafts."""

    def load(self, model: ModelDescription, progress: Progress) -> None: ...

    def start(self, arena: KVArena) -> None: ...

    def submit(self, step: StepPlan) -> StepFuture:
        raise NotImplementedError

    def close(self) -> None: ...


def config(speculation: str, max_draft_tokens: int = 3) -> EngineConfig:
    return EngineConfig(64, 8, 16, speculation=speculation, max_draft_tokens=max_draft_tokens)


def test_settings_choose_the_proposer() -> None:
    proposer = make_proposer(config("ngram"), NullRunner(config("ngram")))
    assert isinstance(proposer, DraftProposer)
    assert proposer.propose(new_request(0, [1, 2, 3, 1, 2])) == [3, 1, 2]
    assert make_proposer(config("off"), NullRunner(config("off"))) is None


def test_a_runner_that_verifies_no_drafts_is_named() -> None:
    assert make_proposer(config("off"), PlainRunner()) is None
    with pytest.raises(ConfigError, match=r"speculation='ngram' .* PlainRunner does not; choose speculation='off'"):
        make_proposer(config("ngram"), PlainRunner())
    with pytest.raises(ConfigError, match=r"'oracle' is none of 'off', 'ngram'"):
        make_proposer(config("oracle"), PlainRunner())


def test_guesses_are_off_unless_asked_for_and_cost_memory_for_their_logits(tmp_path: Path) -> None:
    model = str(build_checkpoint("llama2", tmp_path))

    def planned(**options: object) -> tuple[EngineConfig, int]:
        values = {"model": model, "platform": "null", "max_num_batched_tokens": 4096, **options}
        plan = plan_model(EngineSettings.from_values(values))
        return plan.config, plan.plan.memory.activation_bytes

    off, few = planned()
    assert (off.speculation, off.max_draft_tokens) == ("off", 0)
    default, more = planned(speculation="ngram")
    assert (default.speculation, default.max_draft_tokens) == ("ngram", 4)
    assert planned(speculation="ngram", max_draft_tokens=7)[0].max_draft_tokens == 7
    assert more > few
