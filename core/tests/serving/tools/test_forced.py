"""Calls that must be made: what the grammar takes, and that reading it back does not depend on how it was cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from serving.fakes import CHECKPOINT
from zif.parsing.events import ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.serving.tools.forced import NamedCall, RequiredCalls, named_call_form, required_calls_form

CITY = {
    "name": "get_weather",
    "description": 'see https://a.b/c # not a comment "',
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "url": {"type": "string", "description": "// #"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome"]}},
    },
}
TIME = {"name": "get_time"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    return LLTokenizer((CHECKPOINT / "tokenizer.json").read_text())


def takes(tokenizer, form, text):
    """Say whether a whole answer is what the form allows."""
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(form.grammar))
    assert not matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "get_time", "parameters": {}}]', True),
        ('[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "get_time", "parameters": {}}]', True),
        ('[{"name": "get_weather", "parameters": {"city": "Bonn"}}]', False),
        ('[{"name": "get_weather", "parameters": {}}]', False),
        ('[{"name": "other", "parameters": {}}]', False),
        ("[]", False),
        ('[ {"name": "get_time", "parameters": {}}]', False),
    ],
)
def test_required_calls(tokenizer, text, expected):
    assert takes(tokenizer, required_calls_form([CITY, TIME], parallel=True), text) == expected


def test_only_one_call_without_parallel(tokenizer):
    form = required_calls_form([CITY, TIME], parallel=False)
    one = '{"name": "get_time", "parameters": {}}'
    assert takes(tokenizer, form, f"[{one}]")
    assert not takes(tokenizer, form, f"[{one}, {one}]")


def test_named_call(tokenizer):
    form = named_call_form([CITY, TIME], "get_weather")
    assert takes(tokenizer, form, '{"city": "Paris"}')
    assert not takes(tokenizer, form, '{"city": "Bonn"}')


def test_same_definitions_of_two_functions_stay_apart(tokenizer):
    other = json.loads(json.dumps(CITY)) | {"name": "other"}
    other["parameters"]["$defs"]["city"]["enum"] = ["Oslo"]
    form = required_calls_form([CITY, other], parallel=True)
    assert takes(tokenizer, form, '[{"name": "other", "parameters": {"city": "Oslo"}}]')
    assert not takes(tokenizer, form, '[{"name": "get_weather", "parameters": {"city": "Oslo"}}]')


def read(parser, pieces):
    """Return the calls that a parser finds: name, arguments, whether they ended."""
    calls = {}
    for event in [found for piece in pieces for found in parser.feed(piece)] + parser.finish():
        match event:
            case ToolCallBegin(index, name):
                calls[index] = [name, "", False]
            case ToolCallArguments(index, text):
                calls[index][1] += text
            case ToolCallEnd(index):
                calls[index][2] = True
    return list(calls.values())


def cut(text, places):
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@given(st.lists(OBJECTS, min_size=1, max_size=4), st.lists(st.integers(0, 300)))
def test_any_cut_gives_the_same_calls(arguments, places):
    text = json.dumps([{"name": f"f{k}", "parameters": value} for k, value in enumerate(arguments)])
    expected = [[f"f{k}", json.dumps(value), True] for k, value in enumerate(arguments)]
    assert read(RequiredCalls(), cut(text, places)) == expected
    assert read(RequiredCalls(), list(text)) == expected


@given(OBJECTS, st.lists(st.integers(0, 100)))
def test_any_cut_gives_the_same_arguments(arguments, places):
    text = json.dumps(arguments)
    assert read(NamedCall("f"), cut(text + " more", places)) == [["f", text, True]]


@given(OBJECTS, st.integers(1, 60))
def test_an_answer_cut_off_has_no_end(arguments, length):
    text = json.dumps([{"name": "f", "parameters": arguments}])
    calls = read(RequiredCalls(), [text[: min(length, len(text) - 3)]])
    assert all(not ended for _, _, ended in calls)


@given(st.text(alphabet='[]{}",:\\ab ', max_size=200))
def test_garbage_is_survived(text):
    read(RequiredCalls(), list(text))
    read(NamedCall("f"), list(text))
