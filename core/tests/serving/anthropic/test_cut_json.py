"""What is read of a tool's input that was cut off."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zif.serving.anthropic.cut_json import readable_members

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("", {}),
        ("[1]", {}),
        ("none", {}),
        ('{"a": 1, "b": 2}', {"a": 1, "b": 2}),
        ('{"a": 1, "b": 2', {"a": 1}),
        ('{"a": "x"', {"a": "x"}),
        ('{"a": "x\\"', {}),
        ('{"a": {"b": [1, 2', {"a": {"b": [1]}}),
        ('{"a": ["x", "y"', {"a": ["x", "y"]}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b"', {"a": 1}),
        ('{"a": 1, "b":', {"a": 1}),
        ('{"a": tru', {}),
        ("[" * 100_000, {}),
        ("}" * 1000, {}),
    ],
)
def test_what_is_complete_is_kept(text, members):
    assert readable_members(text) == members


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.integers(0, 200))
def test_nothing_is_made_up(value, length):
    assert _within(readable_members(json.dumps(value)[:length]), value)
    assert readable_members(json.dumps(value)) == value


def test_time_is_linear():
    text = '{"a": [' + '{"b": 1}, ' * 100_000
    begin_s = time.process_time()
    assert len(readable_members(text)["a"]) == 100_000
    assert time.process_time() - begin_s < 5


def _within(part, whole):
    """Say whether all of `part` is in `whole`, at its place."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and _within(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) <= len(whole) and all(map(_within, part, whole))
    return part == whole
