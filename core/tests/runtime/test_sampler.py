"""Greedy choice, options on single logits, penalties, log-probabilities and faults of the sampler."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from support.sampling import SampledBatch, SampledRequest, sample_one
from zif.contract.sampling import SamplingParams, StructuredOutput
from zif.errors import RequestError
from zif.runtime.logit_rules import MinTokens
from zif.runtime.logprobs import prompt_logprobs
from zif.runtime.tokens import SamplePositions, TokenTable

V = 40
GREEDY = {"temperature": 0.0}


def random_logits(rows, seed=0, vocab_size=V):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def ranking(request, logits, count):
    """Return the `count` most preferred tokens: sample greedily, exclude the winner by its raw logit, repeat."""
    logits, order = logits.clone(), []
    for _ in range(count):
        order.append(sample_one(request, logits))
        logits[order[-1]] = -torch.inf
    return order


def assert_same_preferences(request, logits, expected):
    """Compare with expected logits [V] after an independent implementation of the request's options."""
    finite = int(expected.isfinite().sum())
    count = min(finite, 12)
    assert ranking(request, logits, count) == expected.argsort(descending=True)[:count].tolist()


class LargestResult(TorchDispatchMode):
    """Watch how many elements the largest tensor has that any operator gives."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


class TestGreedy:
    def test_the_most_likely_token_is_taken_and_the_lowest_id_among_equals(self):
        logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-9.0, -8.0, -7.0, -torch.inf]])
        batch = SampledBatch([SampledRequest(SamplingParams(temperature=0.0))] * 3, 4)
        assert batch.sample(logits).token_ids == [1, 0, 2]

    def test_it_does_not_depend_on_seed_or_filters(self):
        logits = random_logits(1)[0]
        options = [{}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.5}, {"seed": 5}]
        tokens = {
            sample_one(SampledRequest(SamplingParams(**GREEDY, **o), seed=i), logits) for i, o in enumerate(options)
        }
        assert tokens == {int(logits.argmax())}

    def test_no_rows_give_no_tokens(self):
        batch = SampledBatch([], V)
        assert batch.sample(torch.empty(0, V)).token_ids == []

    def test_a_row_is_free_for_the_next_request(self):
        first = SampledRequest(SamplingParams(allowed_token_ids=[3], logprobs=1, repetition_penalty=9.0, **GREEDY))
        batch = SampledBatch([first], V)
        logits = random_logits(1)
        logits[0, 3] = -50
        assert batch.sample(logits).token_ids == [3]
        batch.sampler.remove(0)
        batch.sampler.add(0, SampledRequest(SamplingParams(**GREEDY)).start(1))
        result = batch.sample(logits)
        assert result.token_ids == [int(logits.argmax())]
        assert not result.logprobs


class TestSingleLogits:
    def test_bias_equals_transformers(self):
        bias = {3: 4.5, 7: -100.0, 39: 2.0}
        logits = random_logits(1, seed=3)[0]
        theirs = SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
        expected = theirs(torch.tensor([[1, 2, 3]]), logits.unsqueeze(0))[0]
        assert_same_preferences(SampledRequest(SamplingParams(logit_bias=bias, **GREEDY)), logits, expected)

    @settings(deadline=None, max_examples=30)
    @given(
        allowed=st.lists(st.integers(0, V - 1), min_size=1, max_size=12), seed=st.integers(0, 99), drawn=st.booleans()
    )
    def test_only_allowed_tokens_are_sampled(self, allowed, seed, drawn):
        logits = random_logits(1, seed)[0]
        params = SamplingParams(allowed_token_ids=allowed, temperature=1.0 if drawn else 0.0)
        token = sample_one(SampledRequest(params, seed=seed), logits)
        assert token in allowed
        assert drawn or token == max(set(allowed), key=lambda i: logits[i])

    @settings(deadline=None, max_examples=60)
    @given(
        words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=4),
        output=st.lists(st.integers(0, 3), max_size=4),
    )
    def test_bad_words_equal_transformers(self, words, prompt, output):
        logits = random_logits(1, seed=5, vocab_size=6)
        expected = NoBadWordsLogitsProcessor(words)(torch.tensor([prompt + output]), logits.clone())[0]
        words = tuple(map(tuple, words))
        request = SampledRequest(SamplingParams(**GREEDY), prompt=prompt, output=output, bad_words_ids=words)
        assert_same_preferences(request, logits[0], expected)

    @pytest.mark.parametrize("num_output", [0, 2, 3, 4])
    def test_min_tokens_equals_transformers(self, num_output):
        prompt, output = [1, 2], list(range(num_output))
        logits = random_logits(1, seed=6)
        logits[0, [11, 12]] = 50.0
        theirs = MinNewTokensLengthLogitsProcessor(2, 3, [11, 12], device="cpu")
        expected = theirs(torch.tensor([prompt + output]), logits.clone())[0]
        stop_ids = frozenset({11, 12, V + 5})
        params = SamplingParams(min_tokens=3, **GREEDY)
        request = SampledRequest(params, prompt=prompt, output=output, stop_ids=stop_ids)
        assert_same_preferences(request, logits[0], expected)

    def test_min_tokens_keeps_ends_that_a_form_leaves_alone_and_copies_a_row_once(self):
        stop_ids, positions = range(15), SamplePositions(TokenTable(3, capacity=4), np.arange(3), np.zeros(3, int))
        rule = MinTokens(3, V)
        for row, form in enumerate((StructuredOutput(regex="a"), StructuredOutput(regex="a"), None)):
            params = SamplingParams(min_tokens=3, structured=form)
            rule.add(row, SampledRequest(params, stop_ids=frozenset(stop_ids)).start(row))
        logits = random_logits(3)
        logits[[0, 2], 15:] = -torch.inf
        expected = logits.clone()
        expected[1:, :15] = -torch.inf
        with LargestResult() as watched:
            rule.apply(logits, positions)
        assert torch.equal(logits, expected)
        assert watched.num_elements <= logits.numel()

    @pytest.mark.parametrize("option", [{"logit_bias": {V: 1.0}}, {"allowed_token_ids": [0, V]}])
    def test_a_token_outside_the_vocabulary_is_an_error_of_the_request(self, option):
        with pytest.raises(RequestError, match=rf"{next(iter(option))}.*{V}.*vocabulary of {V} tokens"):
            SampledBatch([SampledRequest(SamplingParams(**option))], V)


class TestPenalties:
    @settings(deadline=None, max_examples=40)
    @given(
        prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
        output=st.lists(st.integers(0, V - 1), max_size=8),
        penalty=st.sampled_from([0.3, 1.1, 2.0, 20.0]),
    )
    def test_repetition_equals_transformers(self, prompt, output, penalty):
        logits = random_logits(1, seed=7)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())[0]
        params = SamplingParams(repetition_penalty=penalty, **GREEDY)
        assert_same_preferences(SampledRequest(params, prompt=prompt, output=output), logits[0], expected)

    @settings(deadline=None, max_examples=40)
    @given(
        output=st.lists(st.integers(0, 9), max_size=12),
        steps=st.lists(st.integers(0, 9), max_size=6),
        frequency=st.sampled_from([0.0, 0.7, -1.3]),
        presence=st.sampled_from([0.0, 1.9, -0.4]),
        repetition=st.sampled_from([1.0, 1.7]),
    )
    def test_all_penalties_follow_the_tokens_of_each_step(self, output, steps, frequency, presence, repetition):
        """Compare with the published formulas, in plain Python, after some tokens were appended."""
        prompts = [[1, 2, 30], [1, 5, 6, 7, 8, 9, 11, 12, 13]]
        params = SamplingParams(
            frequency_penalty=frequency, presence_penalty=presence, repetition_penalty=repetition, **GREEDY
        )
        requests = [SampledRequest(params, prompt=prompt, output=output) for prompt in prompts]
        batch = SampledBatch(requests, V, rows=[2, 0])
        logits = random_logits(2, seed=8) / 3
        for token in steps:
            batch.sample(logits)
            batch.append([token, token])
        generated = output + steps
        expected = logits.tolist()
        for row, prompt in zip(expected, prompts, strict=True):
            for token in {*prompt, *generated}:
                row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
            for token in set(generated):
                row[token] -= frequency * generated.count(token) + presence
        for _ in range(V):
            for index, token in enumerate(batch.sample(logits).token_ids):
                assert expected[index][token] == pytest.approx(max(expected[index]), abs=1e-5)
                logits[index, token] = expected[index][token] = -1e9

    def test_a_prompt_token_beyond_the_logits_is_left_alone(self):
        params = SamplingParams(repetition_penalty=2.0, **GREEDY)
        logits = random_logits(1)[0]
        assert sample_one(SampledRequest(params, prompt=[V + 3]), logits) == int(logits.argmax())

    def test_rows_with_and_without_penalties_do_not_mix(self):
        logits = torch.zeros(3, V)
        logits[:, 5], logits[:, 6] = 4.0, 3.0
        strong = SamplingParams(presence_penalty=2.0, **GREEDY)
        requests = [
            SampledRequest(SamplingParams(**GREEDY), output=[5]),
            SampledRequest(strong, output=[5]),
            SampledRequest(strong, output=[]),
        ]
        assert SampledBatch(requests, V).sample(logits).token_ids == [5, 6, 5]


class TestLogprobs:
    def test_they_describe_the_raw_logits(self):
        """Bias, temperature and penalties change the token, not its reported log-probability."""
        logits = random_logits(3, seed=9)
        options = {"logit_bias": {17: 100.0}, "temperature": 3.0, "repetition_penalty": 2.0}
        requests = [
            SampledRequest(SamplingParams(logprobs=4, **options)),
            SampledRequest(SamplingParams(**options)),
            SampledRequest(SamplingParams(logprobs=0, **GREEDY)),
        ]
        result = SampledBatch(requests, V).sample(logits)
        assert sorted(result.logprobs) == [0, 2]
        expected = logits.double().log_softmax(dim=1)
        first = result.logprobs[0]
        assert first.token_ids == [17, *expected[0].argsort(descending=True)[:4].tolist()]
        assert first.logprobs == pytest.approx(expected[0][first.token_ids].tolist(), abs=1e-5)
        assert first.rank == 1 + int((expected[0] > expected[0, 17]).sum())
        last = result.logprobs[2]
        assert last.token_ids == result.token_ids[2:]
        assert last.logprobs == pytest.approx([expected[2].max().item()], abs=1e-5)
        assert last.rank == 1

    def test_more_than_the_vocabulary_is_the_vocabulary(self):
        result = SampledBatch([SampledRequest(SamplingParams(logprobs=1000))], V).sample(random_logits(1))
        assert sorted(result.logprobs[0].token_ids[1:]) == list(range(V))

    @pytest.mark.parametrize("k", [0, 1, 5])
    def test_prompt_positions_equal_float64_math_in_any_parts(self, k, monkeypatch):
        monkeypatch.setattr("zif.runtime.logprobs.CHUNK_ELEMENTS", 3 * V)
        logits, token_ids = random_logits(10, seed=10), torch.arange(10) * 4
        values = prompt_logprobs(logits, token_ids, k)
        expected = logits.double().numpy()
        expected = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
        for line, token_id, value in zip(expected, token_ids.tolist(), values, strict=True):
            order = np.argsort(-line).tolist()
            assert value.token_ids == [token_id, *order[:k]]
            assert value.logprobs == pytest.approx(line[value.token_ids].tolist(), abs=1e-5)
            assert value.rank == order.index(token_id) + 1

    def test_no_positions_give_no_values(self):
        assert prompt_logprobs(torch.empty(0, V), torch.empty(0, dtype=torch.int64), 3) == []


class TestFaults:
    @pytest.mark.parametrize(
        ("value", "where", "what"),
        [(math.nan, 4, "NaN"), (math.inf, 4, "maximum is inf"), (-math.inf, slice(None), "maximum is -inf")],
    )
    @pytest.mark.parametrize(
        "options",
        [{}, GREEDY, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"allowed_token_ids": [1]}, {"logprobs": 2}],
        ids=str,
    )
    def test_broken_logits_are_a_fault_of_their_row_alone(self, value, where, what, options):
        logits = random_logits(5, seed=11, vocab_size=700)
        requests = [SampledRequest(SamplingParams(**options), seed=i) for i in range(5)]
        healthy = SampledBatch(requests, 700).sample(logits)
        logits[2, where] = value
        result = SampledBatch(requests, 700).sample(logits)
        assert list(result.faults) == [2]
        assert what in result.faults[2]
        assert "dtype='float32'" in result.faults[2]
        assert result.token_ids[:2] + result.token_ids[3:] == healthy.token_ids[:2] + healthy.token_ids[3:]
        assert 2 not in result.logprobs
        assert all(result.logprobs[i] == healthy.logprobs[i] for i in result.logprobs)

    def test_options_that_leave_no_token_are_a_fault(self):
        requests = [
            SampledRequest(SamplingParams(allowed_token_ids=[4], **GREEDY), bad_words_ids=((4,),)),
            SampledRequest(SamplingParams(allowed_token_ids=[4])),
            SampledRequest(SamplingParams(repetition_penalty=1e-44), prompt=[3]),
        ]
        logits = random_logits(3)
        logits[2, 3] = 20.0
        result = SampledBatch(requests, V).sample(logits)
        assert result.token_ids[1] == 4
        assert sorted(result.faults) == [0, 2]
        assert "allowed_token_ids" in result.faults[0]
