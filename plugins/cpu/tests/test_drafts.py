"""Drafts through the torch runner, planned by hand: no guess, right or wrong, changes a token, in any kind of layer."""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.checkpoints import build_checkpoint
from support.draft_steps import DraftedRequest, HandMadeSteps
from support.greedy_parity import prompts, settings
from zif.contract import BlockUpdate, RequestStart, SamplingParams, StepPlan
from zif.engine.planning import plan_model
from zif.runtime.runner import TorchRunner

FAMILIES = ("llama3", "gemma2", "gpt_oss", "qwen3_next", "granite_hybrid", "falcon_h1")
"""Full attention; windows with soft caps; windows with sinks; delta rule; state space; both in one layer."""
MAX_TOKENS = 64
NUM_OUTPUT_TOKENS = 20
NUM_GUESSES = 4
VOCAB_SIZE = 256
OPTIONS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),
    "penalized": SamplingParams(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4),
    "restricted": SamplingParams(temperature=0.8, min_tokens=9, logit_bias={7: 2.0}, logprobs=0),
}


@pytest.fixture(scope="module", params=FAMILIES)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandMadeSteps]:
    yield from opened(build_checkpoint(request.param, tmp_path_factory.mktemp("model")))


def opened(model: Path) -> Iterator[HandMadeSteps]:
    planned = plan_model(settings(model, max_model_len=MAX_TOKENS, kv_bytes=1 << 27, block_size=8))
    device = planned.platform.open(planned.plan, 0)
    runner = TorchRunner(planned.config, device)
    runner.load(planned.model, lambda done, total: None)
    runner.start(planned.arena)
    yield HandMadeSteps(runner, planned.arena, MAX_TOKENS)
    runner.close()
    device.close()


@functools.cache
def batch() -> tuple[DraftedRequest, ...]:
    """One request for each set of options, and what some options need."""
    own = [DraftedRequest(list(prompts()[i + 1]), sampling, seed=i) for i, sampling in enumerate(OPTIONS.values())]
    own[3].stop_ids = frozenset(range(0, VOCAB_SIZE, 3))
    own[3].bad_words_ids = tuple((a, b) for a in range(0, VOCAB_SIZE, 5) for b in range(1, VOCAB_SIZE, 7))
    return tuple(own)


def start_all(steps: HandMadeSteps) -> list[DraftedRequest]:
    steps.forget_all()
    return [steps.add(i, request.reset()) for i, request in enumerate(batch())]


def undrafted(steps: HandMadeSteps) -> list[DraftedRequest]:
    requests = start_all(steps)
    for _ in range(NUM_OUTPUT_TOKENS):
        steps.step()
    return requests


def guesses_of(kind: str, text: list[int], known: int, turn: int) -> list[int]:
    right = text[known : known + NUM_GUESSES]
    num_right = {"right": len(right), "wrong": 0, "partly": turn % (NUM_GUESSES + 1)}[kind]
    return [token if i < num_right else (token + 1) % VOCAB_SIZE for i, token in enumerate(right)]


def assert_same_text(drafted: list[DraftedRequest], expected: list[DraftedRequest]) -> None:
    for ours, theirs in zip(drafted, expected, strict=True):
        assert ours.fault is None
        assert ours.output[:NUM_OUTPUT_TOKENS] == theirs.output[: len(ours.output)][:NUM_OUTPUT_TOKENS]
        if ours.sampling.logprobs is None:
            assert not ours.logprobs
            continue
        assert len(ours.logprobs) == len(ours.output)
        for entry, other in zip(ours.logprobs, theirs.logprobs, strict=False):
            assert (entry.token_ids, entry.rank) == (other.token_ids, other.rank)
            assert entry.logprobs == pytest.approx(other.logprobs, abs=5e-4)


@pytest.mark.parametrize("kind", ["right", "wrong", "partly"])
def test_the_text_with_drafts_is_the_text_without(steps: HandMadeSteps, kind: str) -> None:
    expected = undrafted(steps)
    assert len(set(expected[1].output)) > 4
    requests = start_all(steps)
    steps.step()
    for turn in range(NUM_OUTPUT_TOKENS):
        going = {i: r for i, r in enumerate(requests) if len(r.output) < NUM_OUTPUT_TOKENS - 1}
        if not going:
            break
        steps.step({i: guesses_of(kind, expected[i].token_ids, len(r.token_ids), turn + i) for i, r in going.items()})
    assert_same_text(requests, expected)
    num_steps = {"right": range(5, 8), "wrong": range(19, 22), "partly": range(7, 13)}[kind]
    assert requests[0].num_steps in num_steps


def test_rows_with_drafts_share_steps_with_prompts_and_single_tokens(steps: HandMadeSteps) -> None:
    expected = undrafted(steps)
    requests = start_all(steps)
    for turn in range(24):
        drafts = {
            i: guesses_of("partly", expected[i].token_ids, len(request.token_ids), turn + i)
            for i, request in enumerate(requests)
            if (turn + i) % 3 and NUM_OUTPUT_TOKENS - 1 > len(request.output) > 0
        }
        short = [r for r in requests if len(r.output) < NUM_OUTPUT_TOKENS]
        if not short:
            break
        # Requests begin one after the other: a prompt is computed in pieces beside rows that guess.
        steps.step(drafts, {i: 3 + 2 * i for i, request in enumerate(requests) if not request.output})
    assert min(len(request.output) for request in requests) >= NUM_OUTPUT_TOKENS - 1
    assert_same_text(requests, expected)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandMadeSteps]:
    yield from opened(build_checkpoint("llama3", tmp_path_factory.mktemp("plain")))


@pytest.fixture
def poisoned(plain: HandMadeSteps, monkeypatch: pytest.MonkeyPatch) -> HandMadeSteps:
    """Let one token, 200, give NaN."""
    embedding = torch.nn.functional.embedding

    def poisoned_embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return embedding(token_ids, weight).masked_fill((token_ids == 200)[:, None], float("nan"))

    monkeypatch.setattr(torch.nn.functional, "embedding", poisoned_embedding)
    return plain


def test_a_fault_at_a_refused_guess_fails_nobody(poisoned: HandMadeSteps) -> None:
    expected = undrafted(poisoned)
    assert all(200 not in request.token_ids for request in expected)
    requests = start_all(poisoned)
    poisoned.step()
    for _ in range(6):
        rest = [expected[i].token_ids[len(request.token_ids) :] for i, request in enumerate(requests)]
        poisoned.step({i: [*rest[i][:2], 200, 5] for i in (0, 1, 2)})
    assert_same_text(requests, expected)


def test_a_fault_that_no_guess_brought_fails_its_request_alone(poisoned: HandMadeSteps) -> None:
    expected = undrafted(poisoned)
    requests = start_all(poisoned)
    bad = poisoned.add(9, DraftedRequest([5, 200, 6, 7]))
    poisoned.step()
    assert "NaN" in (bad.fault or "")
    bad.token_ids[-1] = 8
    result = poisoned.step({9: [1, 2], 0: expected[0].token_ids[len(requests[0].token_ids) :][:3]})
    assert list(result.faults) == [9]
    assert [len(tokens) for tokens in result.sampled[:4]] == [4, 1, 1, 1]
    assert_same_text(requests, expected)


def test_a_block_update_replaces_what_refused_guesses_gave_back(plain: HandMadeSteps) -> None:
    expected = undrafted(plain)[0]
    first = start_all(plain)[0]
    plain.step()
    computed = first.num_computed
    spare = max(block for request in plain.requests.values() for block in request.tables[0]) + 1
    update = BlockUpdate(0, 0, computed // 8 + 1, [spare])
    # Another request writes into the block that the first one had there before.
    start = RequestStart(20, list(range(5, 13)), 8, ([first.tables[0][computed // 8 + 1]],), first.sampling, 0)
    output = list(first.output)
    for step in range(10):
        plan = StepPlan(100 + step, [0], [computed + step], [1], [True])
        if not step:
            plan.block_updates = [update]
        if step == 9:
            plan = StepPlan(109, [20, 0], [0, computed + step], [8, 1], [True, True], started=[start], total_tokens=9)
        output += plain.runner.submit(plan).result().sampled[-1]
    assert output == expected.output[: len(output)]
