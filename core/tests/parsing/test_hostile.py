"""Answers that mean no good: every limit holds, nothing takes longer than its length allows, nothing is lost."""

import json
import sys

import pytest

from parsing.answers import CALLING, FORMATS, TOOLS, calls_of, markers_of, parse, text_of
from zif.parsing.call_object import MAX_STRING_CHARACTERS
from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin
from zif.parsing.formats import load_format
from zif.parsing.json_values import MAX_DEPTH
from zif.parsing.parameters import MAX_TYPED_CHARACTERS
from zif.parsing.parser import MAX_BLANKS, MAX_CALLS, MAX_HELD_CHARACTERS, Parser
from zif.parsing.writing import WrittenCall, write_answer

MEGABYTE = 10**6
QUOTING = [name for name in CALLING if load_format(name).written.parameter is None]
"""Formats whose arguments are JSON. The others cannot say where a value ends but by its end marker."""


@pytest.mark.parametrize("name", QUOTING)
def test_markers_within_strings_are_text_of_the_argument(name):
    form = load_format(name)
    value = "".join(markers_of(name)) + '}"{' + write_answer(form, "", "", [WrittenCall("f", "{}")])
    arguments = json.dumps({"a": value}, ensure_ascii=False)
    assert calls_of(parse(name, write_answer(form, "", "", [WrittenCall("f", arguments)]))) == [("f", arguments, True)]


@pytest.mark.parametrize("name", FORMATS)
def test_half_markers_are_text(name):
    form = load_format(name)
    markers = list(form.states[form.text].markers.targets) or ["<think>"]
    halves = " and ".join(marker[:size] for marker in markers for size in range(1, len(marker)))
    answer = f"x {halves} y"
    assert parse(name, answer) == [TextPiece(answer)]
    assert parse(name, list(answer)) == [TextPiece(answer)]


@pytest.mark.parametrize("name", CALLING)
def test_calls_beyond_the_limit_are_text(name):
    form = load_format(name)
    answer = write_answer(form, "", "", [WrittenCall("f", "{}")] * 10_000)
    events = parse(name, answer)
    assert len(calls_of(events)) == MAX_CALLS
    assert len(text_of(events)) > 10 * (10_000 - MAX_CALLS)


@pytest.mark.parametrize("name", QUOTING)
def test_deep_json_has_no_end(name):
    deep = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    deeper = '{"a":' * 100_000
    form = load_format(name)
    ((_, arguments, is_whole),) = calls_of(parse(name, write_answer(form, "", "", [WrittenCall("f", deep)])))
    assert (json.loads(arguments), is_whole) == (json.loads(deep), True)
    ((_, arguments, is_whole),) = calls_of(parse(name, write_answer(form, "", "", [WrittenCall("f", deeper)])))
    assert is_whole is False
    assert arguments.startswith(deeper[: 5 * MAX_DEPTH])


@pytest.mark.parametrize(
    "arguments", ["[1]", '"{}"', "null", "{", '{"a": 01}', '{"a": "\n"}', '{"a": \x00}', "{'a': 1}"]
)
def test_invalid_arguments_come_as_written_and_have_no_end(arguments):
    answer = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>Bye.'
    events = parse("hermes", answer)
    ((called, found, is_whole),) = calls_of(events)
    assert called == "f"
    assert found.startswith(arguments)
    assert is_whole is False
    assert text_of(events) == "Bye."


@pytest.mark.parametrize("name", ["1", '""', '"a b"', '"a\\u0000"', '"\\ud800"', '"a', "{}", f'"{"x" * 300}"'])
def test_a_call_without_a_name_that_a_tool_may_have_is_text(name):
    answer = f'a <tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call> b'
    assert parse("hermes", answer) == [TextPiece(answer)]


@pytest.mark.parametrize("call", ["", "{}", "[]", "x", '{"arguments": {"a": 1}}', '{"name', "{'name': 'f'}", "null"])
def test_what_names_no_tool_is_text(call):
    answer = f"a <tool_call>{call}</tool_call> b"
    assert parse("hermes", answer) == [TextPiece(answer)]


def test_a_name_or_key_without_end_becomes_text():
    for begin in ("[TOOL_CALLS]", '[TOOL_CALLS] [{"', '[TOOL_CALLS] [{"name": "'):
        answer = begin + "x" * 5000
        assert text_of(parse("mistral", answer)) == answer
        parser = Parser(load_format("mistral"), TOOLS)
        for character in answer:
            parser.feed(character)
            assert parser.num_held_characters <= MAX_STRING_CHARACTERS + 64


@pytest.mark.parametrize("size", [2000, MAX_HELD_CHARACTERS])
def test_limits_count_characters_and_not_pieces(size):
    for begin in ("[TOOL_CALLS]", '[TOOL_CALLS] [{"', '[TOOL_CALLS] [{"name": "'):
        answer = begin + "x" * size + "[TOOL_CALLS]f[ARGS]{}"
        whole = parse("mistral", answer)
        assert calls_of(whole) == [("f", "{}", True)]
        assert parse("mistral", list(answer)) == whole


def test_a_header_without_end_becomes_text():
    answer = "<|channel|>" + "x" * 5000
    assert parse("harmony", answer) == [TextPiece(answer)]


def test_arguments_before_the_name_are_held_up_to_a_limit():
    begin = '<tool_call>{"arguments": {"a": "'
    for size, num_calls in ((1000, 1), (MAX_HELD_CHARACTERS, 0)):
        answer = f'{begin}{"x" * size}"}}, "name": "f"}}</tool_call>'
        events = parse("hermes", answer)
        assert len(calls_of(events)) == num_calls
        if not num_calls:
            assert events == [TextPiece(answer)]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_held_is_bounded(name):
    worst = [
        "".join(markers_of(name)) * 2000,
        *(marker + " " * (2 * MAX_HELD_CHARACTERS) for marker in markers_of(name)),
        *(marker + '{"arguments": {"a": "' + "x" * (2 * MAX_HELD_CHARACTERS) for marker in markers_of(name)[:3]),
    ]
    longest = max(map(len, markers_of(name)))
    for answer in worst:
        parser = Parser(load_format(name), TOOLS)
        for start in range(0, len(answer), 997):
            parser.feed(answer[start : start + 997])
            assert parser.num_held_characters <= MAX_HELD_CHARACTERS + longest + MAX_BLANKS
        parser.finish()


def test_nothing_but_possible_markers_is_held():
    parser = Parser(load_format("hermes"), TOOLS)
    for text, shown in (("Hello", "Hello"), (" <", ""), ("b", " <b"), ("\n", ""), ("<tool", ""), ("s", "\n<tools")):
        assert "".join(event.text for event in parser.feed(text)) == shown


def test_a_long_typed_value_is_a_string():
    value = "[" + "1," * MAX_TYPED_CHARACTERS + "1]"
    answer = f"<function=get_weather><parameter=any>{value}</parameter></function>"
    ((_, arguments, is_whole),) = calls_of(parse("qwen3_coder", answer))
    assert is_whole
    assert json.loads(arguments) == {"any": value}


def test_unreadable_parameters_come_as_written():
    answer = "<function=f>\n<parameter=a>1</parameter> oh <parameter=b>2</parameter></function>Bye."
    events = parse("qwen3_coder", answer)
    assert calls_of(events) == [("f", '{"a": "1"oh <parameter=b>2</parameter>', False)]
    assert text_of(events) == "Bye."


def test_a_schema_that_refers_to_itself_is_no_trap():
    loop = {"anyOf": [{"$ref": "#/$defs/a"}] * 100}
    schema = {"properties": {"x": loop}, "$defs": {"a": loop}}
    answer = "<function=f><parameter=x>1</parameter></function>"
    assert calls_of(parse("qwen3_coder", answer, {"f": schema})) == [("f", '{"x": 1}', True)]


@pytest.mark.parametrize(
    "schema", [None, 3, [], {"properties": 1}, {"properties": {"x": 1}}, {"properties": {"y": {}}}]
)
def test_a_schema_that_says_nothing_means_strings(schema):
    answer = "<function=f><parameter=x>1</parameter></function>"
    assert calls_of(parse("qwen3_coder", answer, {"f": schema})) == [("f", '{"x": "1"}', True)]


def test_nul_and_lone_surrogates_pass_as_text():
    answer = "a\x00b\ud800<\x00>"
    assert parse("hermes", list(answer)) == [TextPiece(answer)]


def test_events_of_a_call_follow_one_another():
    answer = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * 50 + '"}}</tool_call>'
    parser = Parser(load_format("hermes"), TOOLS)
    events = [event for character in answer for event in parser.feed(character)]
    assert events[0] == ToolCallBegin(0, "f")
    assert all(isinstance(event, ToolCallArguments) for event in events[1:-1])
    assert len(events) > 50


def long_answers(name, size):
    """Return answers of about `size` characters that a careless parser would read again and again."""
    form = load_format(name)
    markers = markers_of(name)
    answers = ["x" * size, " " * size, markers[0][0] * size, "".join(markers) * (size // len("".join(markers)))]
    answers += [marker[:-1] * (size // len(marker)) for marker in markers if len(marker) > 4]
    if form.has_calls:
        arguments = json.dumps({"a": "\\x" * (size // 4), "b": [1] * (size // 8)})
        answers.append(write_answer(form, "", "", [WrittenCall("f", arguments)]))
        answers.append(write_answer(form, "", "", [WrittenCall("f", '{"a": 1}')] * (size // 60)))
    return answers


def num_calls_made(name, answer, piece_size):
    """Count the Python and C functions that parsing an answer calls."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    parser = Parser(load_format(name), TOOLS)
    pieces = [answer[start : start + piece_size] for start in range(0, len(answer), piece_size)]
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("piece_size", "size"), [(1, 500), (10**9, 2000)])
@pytest.mark.parametrize("name", FORMATS)
def test_work_grows_with_the_length_and_no_faster(name, piece_size, size):
    for short, long in zip(long_answers(name, size), long_answers(name, 4 * size), strict=True):
        ratio = len(long) / len(short)
        assert num_calls_made(name, long, piece_size) <= 1.3 * ratio * num_calls_made(name, short, piece_size) + 500


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_megabyte_takes_at_most_so_many_steps(name):
    for answer in long_answers(name, MEGABYTE):
        assert num_calls_made(name, answer, 4096) <= 20 * len(answer)
