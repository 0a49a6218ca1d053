"""The incremental JSON check says what a whole JSON decoder says, wherever the text is cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zif.parsing.json_values import MAX_DEPTH, MAX_NUMBER_CHARACTERS, JsonScanner, is_json

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


def _strict(text):
    """Return whether Python's decoder takes the text, without what it takes beyond RFC 8259."""

    def refuse(word):
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@given(value=_VALUES, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
@settings(max_examples=80, deadline=None)
def test_what_an_encoder_writes_is_json(value, indent, ascii_only):
    assert is_json(json.dumps(value, indent=indent, ensure_ascii=ascii_only))


@given(value=_VALUES, data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_json_is_judged_as_a_decoder_judges_it(value, data):
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    noise = data.draw(st.text(alphabet='{}[]":,\\u0 1-+.eEtrflsNanI\n\x00', max_size=3))
    damaged = text[:at] + noise + text[data.draw(st.integers(at, len(text))) :]
    assert is_json(damaged) == _strict(damaged)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", '{"a":1,}', "01", "1.", ".5", "+1", "-", "1e", "NaN", "Infinity", "-Infinity", "tru", "'a'"]  # noqa: RUF005
    + ['"\n"', '"\x00"', '"\\x"', '"\\u12g4"', "{a:1}", "[1 2]", "{1:2}", "[}", "1 2", '{"a" 1}', "nulll", "//"],
)
def test_what_is_no_json(text):
    assert not _strict(text)
    assert not is_json(text)


@given(value=_VALUES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_end_is_found_wherever_the_text_is_cut(value, data):
    text = json.dumps([value])
    follows = data.draw(st.sampled_from(["", "]", ",", "}x", "</tool_call>"]))
    scanner, taken = JsonScanner(), ""
    for character in text + follows:
        taken += character[: scanner.scan(character, 0, 1)]
    assert scanner.done
    assert taken == text


def test_nesting_is_bounded():
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    scanner = JsonScanner()
    assert scanner.scan("[" * 10**6, 0, 10**6) == MAX_DEPTH
    assert scanner.failed


def test_numbers_are_bounded():
    assert is_json("1" * (MAX_NUMBER_CHARACTERS - 1))
    assert not is_json("1" * MAX_NUMBER_CHARACTERS)
    scanner = JsonScanner()
    for _ in range(5000):
        scanner.scan("1", 0, 1)
    assert scanner.failed
    assert JsonScanner().scan("1" * 5000, 0, 5000) == MAX_NUMBER_CHARACTERS
