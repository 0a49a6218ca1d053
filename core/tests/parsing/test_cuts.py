"""Any cut of an answer gives the same result as no cut, whatever the answer is."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsing.answers import CALLING, FORMATS, TOOLS, calls_of, cut_at, markers_of, parse, random_answer
from zif.parsing.events import ReasoningPiece, TextPiece, ToolCallEnd


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_cut_gives_what_no_cut_gives(name, data):
    answer = random_answer(name, data.draw(st.randoms(use_true_random=False)))
    options = {"tools": data.draw(st.sampled_from([TOOLS, (), ["f"]])), "starts_in_reasoning": data.draw(st.booleans())}
    places = data.draw(st.lists(st.integers(0, len(answer)), max_size=8))
    whole = parse(name, answer, **options)
    assert parse(name, cut_at(answer, places), **options) == whole
    assert parse(name, list(answer), **options) == whole


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_text_is_parsed_alike(name, data):
    part = st.one_of(st.sampled_from(markers_of(name)), st.sampled_from(list('{}[]":, \n\x00\ud7ff')), st.text())
    answer = "".join(data.draw(st.lists(part, max_size=20)))
    whole = parse(name, answer)
    assert parse(name, list(answer)) == whole
    for at in range(0, len(answer) + 1, max(1, len(answer) // 8)):
        assert parse(name, cut_at(answer, [at])) == whole


@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_in_two_of_many_answers(name):
    generator = random.Random(name)
    for _ in range(8):
        answer = random_answer(name, generator)
        whole = parse(name, answer)
        for at in range(len(answer) + 1):
            assert parse(name, cut_at(answer, [at])) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_random_splits(name):
    generator = random.Random(f"splits of {name}")
    for _ in range(2500):
        answer = random_answer(name, generator)
        whole = parse(name, answer)
        for _ in range(4):
            places = [generator.randrange(len(answer) + 1) for _ in range(generator.randrange(12))]
            assert parse(name, cut_at(answer, places)) == whole


@pytest.mark.parametrize("name", CALLING)
def test_a_whole_call_has_arguments_that_are_a_json_object(name):
    generator = random.Random(f"arguments of {name}")
    num_whole = 0
    for _ in range(400):
        for called, arguments, is_whole in calls_of(parse(name, random_answer(name, generator))):
            assert called
            if is_whole:
                num_whole += 1
                assert isinstance(json.loads(arguments), dict)
    assert num_whole > 25


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_first_stays_when_more_comes(name):
    # A prefix of the answer gives a prefix of the events: nothing is shown that is taken back later.
    generator = random.Random(f"prefixes of {name}")
    for _ in range(12):
        answer = random_answer(name, generator)
        whole = _flat(parse(name, answer))
        for at in range(len(answer)):
            held = _flat(parse_unfinished(name, answer[:at]))
            assert whole[: len(held)] == held


def parse_unfinished(name, text):
    from zif.parsing.formats import load_format
    from zif.parsing.parser import Parser

    return Parser(load_format(name), TOOLS).feed(text)


def _flat(events):
    """Return events character by character."""
    flat = []
    for event in events:
        text = getattr(event, "text", None)
        kind = type(event)
        flat += [(kind, character) for character in text] if text is not None else [event]
    assert all(isinstance(one, tuple) or not isinstance(one, TextPiece | ReasoningPiece) for one in flat)
    assert ToolCallEnd not in flat
    return flat
