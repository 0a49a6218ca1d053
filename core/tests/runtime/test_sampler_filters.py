"""Temperature, min_p, top_k and top_p against the warpers of transformers, and the drawing itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from support.sampling import SampledBatch, SampledRequest, sample_one
from zif.contract.sampling import SamplingParams
from zif.runtime.drawing import DrawOptions, draw_tokens
from zif.runtime.randomness import draw_fractions, stream_state

VOCAB_SIZE = 1300
OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.02, "top_k": 600, "top_p": 0.95},
    {"min_p": 0.3, "top_p": 0.6},
]


def warped_probabilities(logits, params):
    """Return the distribution that transformers' warpers leave, in float64, in vLLM's order. logits: [V]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers(None, logits.double().unsqueeze(0)).softmax(dim=-1)[0].numpy()


def inverse_cdf(probabilities, seed, position):
    fraction = draw_fractions(np.array([stream_state(seed)]), np.array([position]))[0] / 2.0**62
    return int(np.searchsorted(np.cumsum(probabilities), fraction, side="right"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_equal_the_inverse_distribution_of_the_warped_logits(options):
    params = SamplingParams(**options)
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    requests = [SampledRequest(params, seed=seed) for seed in range(300)]
    sampled = SampledBatch(requests, VOCAB_SIZE).sample(logits.expand(300, -1)).token_ids
    probabilities = warped_probabilities(logits, params)
    assert sampled == [inverse_cdf(probabilities, seed, position=3) for seed in range(300)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies_follow_the_warped_distribution(options):
    params = SamplingParams(**options)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 1.5
    batch = SampledBatch([SampledRequest(params, seed=seed) for seed in range(500)], 12)
    sampled = [token_id for _ in range(10) for token_id in batch.step(logits.expand(500, -1))]
    expected = warped_probabilities(logits, params) * len(sampled)
    counts = np.bincount(sampled, minlength=12)
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    assert chi_square < 3 * possible.sum() + 10  # beyond any quantile of use; seeds are fixed


def test_a_token_tied_with_the_k_th_is_kept():
    logits = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0])
    params = SamplingParams(top_k=2)
    requests = [SampledRequest(params, seed=seed) for seed in range(100)]
    assert set(SampledBatch(requests, 5).sample(logits.expand(100, -1)).token_ids) == {0, 2, 3, 4}


def test_top_p_looks_beyond_its_first_candidates():
    """A flat distribution needs nearly all of a vocabulary much larger than the first look."""
    vocab_size = 20_000
    logits = torch.linspace(0.0, 1e-3, vocab_size)
    params = SamplingParams(top_p=0.9)
    requests = [SampledRequest(params, seed=seed) for seed in range(200)]
    requests[7] = SampledRequest(SamplingParams(top_p=0.9, top_k=3), seed=7)
    sampled = SampledBatch(requests, vocab_size).sample(logits.expand(200, -1)).token_ids
    assert sampled.pop(7) >= vocab_size - 3
    assert 1980 < min(sampled) < 2200
    assert max(sampled) > 19_500


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_logits_of_any_size_are_drawn_from(scale):
    logits = torch.tensor([-1.0, 1.0, 0.5]) * scale
    drawn = {sample_one(SampledRequest(SamplingParams(temperature=0.01), seed=s), logits) for s in range(50)}
    assert drawn == ({1} if scale > 1 else {0, 1, 2})


def test_excluded_tokens_are_never_drawn():
    logits = torch.full((700,), -torch.inf)
    logits[[5, 600, 699]] = torch.tensor([0.0, 0.1, 0.2])
    for options in ({}, {"top_p": 0.99999}, {"top_k": 50}):
        requests = [SampledRequest(SamplingParams(**options), seed=seed) for seed in range(100)]
        assert set(SampledBatch(requests, 700).sample(logits.expand(100, -1)).token_ids) == {5, 600, 699}


@pytest.mark.parametrize(("fraction", "token"), [(0, 1100), (2**62 - 1, 1290)])
def test_the_ends_of_the_random_numbers_give_the_first_and_the_last_possible_token(fraction, token):
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, [1100, 1200, 1290]] = torch.tensor([0.0, 3.0, 1.0])
    columns = [np.ones(1, np.float32), np.zeros(1, np.float32), np.full(1, VOCAB_SIZE), np.ones(1)]
    options = DrawOptions(*columns, fractions=np.array([fraction]))
    assert draw_tokens(logits, np.zeros(1, dtype=np.int64), options).tolist() == [token]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_request_gets_the_same_tokens_alone_and_in_any_batch(data):
    options = st.sampled_from([*OPTIONS, {"temperature": 0.0}, {"repetition_penalty": 1.3}, {"logprobs": 2}])
    chosen = data.draw(st.lists(options, min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(chosen))))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(3, len(chosen), 611, generator=generator) * 2
    requests = [SampledRequest(SamplingParams(**o), seed=i % 3, output=[i]) for i, o in enumerate(chosen)]
    together = SampledBatch([requests[i] for i in order], 611, rows=[3 * i + 1 for i in order])
    alone = [SampledBatch([request], 611) for request in requests]
    for step_logits in logits:
        expected = [batch.step(step_logits[i : i + 1])[0] for i, batch in enumerate(alone)]
        assert together.step(step_logits[list(order)]) == [expected[i] for i in order]


def test_large_batches_are_drawn_in_parts_with_the_same_result(monkeypatch):
    logits = torch.randn(30, 800, generator=torch.Generator().manual_seed(4))
    requests = [SampledRequest(SamplingParams(**OPTIONS[i % len(OPTIONS)]), seed=i) for i in range(30)]
    whole = SampledBatch(requests, 800).sample(logits).token_ids
    monkeypatch.setattr("zif.runtime.drawing.CHUNK_ELEMENTS", 800 * 4 + 1)
    assert SampledBatch(requests, 800).sample(logits).token_ids == whole


def test_a_resumed_request_draws_what_it_would_have_drawn():
    """Preemption gives a request back with its output as known tokens, in another row."""
    logits = torch.randn(6, 1, 300, generator=torch.Generator().manual_seed(5))
    params = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.4, frequency_penalty=0.3)
    batch = SampledBatch([SampledRequest(params, seed=9)], 300)
    tokens = [batch.step(step)[0] for step in logits]
    resumed = SampledBatch([SampledRequest(params, seed=9, output=tokens[:3])], 300, rows=[4])
    assert [resumed.step(step)[0] for step in logits[3:]] == tokens[3:]
