"""Answers that nobody reads for a while: any merging says the same, in bounded memory."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zif.serving.answers import AnswerDelta, SampleDelta, TokenLogprob
from zif.serving.engine.streams import AnswerStream, merge


def delta(sample, text, token_id, *, finished=False, prompt_logprobs=None):
    logprobs = [[TokenLogprob(token_id, -1.0, 1, text)]]
    end = "length" if finished else None
    return AnswerDelta([SampleDelta(sample, text, [token_id], logprobs, end)], finished, 4, 0, prompt_logprobs)


def contents(deltas):
    """Return what deltas say, by sample."""
    said = {}
    for one in deltas:
        for sample in one.samples:
            text, token_ids, logprobs, _ = said.get(sample.index, ("", [], [], None))
            logprobs = logprobs + (sample.logprobs or [])
            said[sample.index] = (text + sample.text, token_ids + sample.token_ids, logprobs, sample.finish_reason)
    return said


ANSWERS = st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3), st.integers(0, 99)), min_size=1, max_size=300)


@given(ANSWERS, st.lists(st.integers(1, 120), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_pace_of_reading_gives_the_same_answer(answer, reads):
    last = len(answer) - 1
    deltas = [
        delta(*one, finished=i == last, prompt_logprobs=[None] if i == 0 else None) for i, one in enumerate(answer)
    ]

    async def read():
        stream = AnswerStream(1, 1, 4)
        seen, paces = [], iter(reads)
        until = next(paces, 10**6)
        for count, one in enumerate(deltas):
            stream.put(one)
            if count >= until:
                seen.append(await stream.next())
                until += next(paces, 10**6)
        while not (seen and seen[-1].finished):
            seen.append(await stream.next())
        return seen

    seen = asyncio.run(read())
    assert contents(seen) == contents(deltas)
    assert [one.prompt_logprobs for one in seen if one.prompt_logprobs is not None] == [[None]]


def test_a_single_delta_is_handed_on_as_it_is():
    one = delta(0, "a", 1)
    assert merge([one]) is one


def test_what_is_unread_is_few_objects():
    stream = AnswerStream(1, 1, 4)
    for _ in range(20_000):
        stream.put(delta(0, "a", 1))
    assert len(stream._deltas) <= 2 * sum(len(s.token_ids) for s in stream._deltas[0].samples)
    (merged,) = [asyncio.run(stream.next())]
    assert merged.samples[0].text == "a" * 20_000


def test_an_error_comes_after_what_was_received():
    async def read():
        stream = AnswerStream(1, 1, 4)
        stream.put(delta(0, "a", 1))
        stream.fail(ValueError("gone"))
        first = await stream.next()
        with pytest.raises(ValueError, match="gone"):
            await stream.next()
        return first

    assert asyncio.run(read()).samples[0].text == "a"


def test_an_abandoned_stream_keeps_nothing():
    stream = AnswerStream(1, 1, 4)
    stream.put(delta(0, "a", 1))
    stream.abandon()
    stream.put(delta(0, "b", 2))
    assert stream._deltas == []
