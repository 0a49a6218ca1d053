"""Sampling options: what is accepted, what is refused, and with which words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zif.contract.sampling import GREEDY_TEMPERATURE, MAX_LOGPROBS, SamplingParams
from zif.errors import RequestError

RANGES = {
    "n": (1, 4096),
    "temperature": (0.0, 100.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "min_tokens": (0, 16),
    "max_tokens": (1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
INTEGERS = ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs")


@pytest.mark.parametrize("name", RANGES)
def test_the_ends_of_a_range_are_accepted_and_what_lies_beyond_is_refused(name):
    low, high = RANGES[name]
    for value in (low, high):
        assert getattr(SamplingParams(**{name: value}), name) == value
    step = 1 if name in INTEGERS else 1e-9
    for value in (low - step, high + step):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "high"), [("top_p", 1.0), ("repetition_penalty", 100.0)])
def test_zero_is_outside_of_a_range_that_is_open_below(name, high):
    assert getattr(SamplingParams(**{name: high}), name) == high
    SamplingParams(**{name: 1e-9})
    for value in (0.0, -0.1, high + 1e-9):
        with pytest.raises(RequestError, match=rf"{name}={value}.*\(0.0, {high}\]"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*RANGES, "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["1", True, [1], math.nan, math.inf])
def test_values_of_another_kind_are_refused(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
def test_whole_numbers_must_be_integers(name):
    with pytest.raises(RequestError, match=rf"{name}=2.0 must be an integer"):
        SamplingParams(**{name: 2.0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 exceeds max_tokens=4"),
        ({"stop": ["a", ""]}, "non-empty string"),
        ({"stop": [3]}, "non-empty string"),
        ({"stop": "x", "detokenize": False}, "detokenize=True"),
        ({"bad_words": ["ok", " "]}, "bad_words"),
        ({"allowed_token_ids": []}, "no token could be sampled"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids=-1"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids=1.5 must be an integer"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias=-3"),
        ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\]=101.0 is out of range: \[-100.0, 100.0\]"),
        ({"logit_bias": {3: math.nan}}, r"logit_bias\[3\]=nan"),
    ],
)
def test_lists_and_combinations(options, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**options)


def test_no_limit_on_tokens_goes_with_any_minimum():
    assert SamplingParams(max_tokens=None, min_tokens=10_000).max_tokens is None


def test_stop_strings_are_a_tuple_whatever_was_given():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (GREEDY_TEMPERATURE, True), (2e-5, False), (1, False)])
def test_greedy_is_a_temperature_near_zero(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


@given(seed=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), n=st.integers(1, 6))
def test_samples_have_seeds_of_their_own(seed, n):
    params = SamplingParams(seed=seed, n=n, top_p=0.5)
    samples = [params.for_sample(index) for index in range(n)]
    assert all(sample.n == 1 and sample.top_p == 0.5 for sample in samples)
    seeds = [sample.seed for sample in samples]
    assert seeds[0] == seed
    assert seeds == [None] * n if seed is None else len(set(seeds)) == n


def test_options_cannot_change_after_the_check():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = -1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 5),
        ("bad_words", "abc"),
        ("bad_words", 5),
        ("stop_token_ids", 5),
        ("allowed_token_ids", "12"),
        ("logit_bias", [1]),
        ("ignore_eos", "yes"),
        ("detokenize", None),
        ("skip_special_tokens", 1),
    ],
)
def test_options_of_another_kind_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"{name}=.* must"):
        SamplingParams(**{name: value})
