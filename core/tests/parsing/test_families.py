"""Answers as the families write them, in full, with what they mean. The texts follow the families' own documents."""

import json

import pytest

from parsing.answers import CALLING, FORMATS, REASONING, TOOLS, calls_of, parse, text_of
from zif.parsing.events import ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import load_format
from zif.parsing.writing import WrittenCall, write_answer

ONE_CALL = [ToolCallBegin(0, "f"), ToolCallArguments(0, '{"a": 1}'), ToolCallEnd(0)]
NO_ARGUMENTS = [ToolCallBegin(0, "f"), ToolCallArguments(0, "{}"), ToolCallEnd(0)]
BEGIN, END = (f"<\uff5ctool\u2581calls\u2581{word}\uff5c>" for word in ("begin", "end"))
CALL, CALL_END = (f"<\uff5ctool\u2581call\u2581{word}\uff5c>" for word in ("begin", "end"))
SEP = "<\uff5ctool\u2581sep\uff5c>"
KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"

JSON_ANSWER = '{"name": "f", "age": 3, "parameters": {}}'
# family, answer, events
CASES = [
    ("plain", " <think>as it is</think>\n", [TextPiece(" <think>as it is</think>\n")]),
    ("think", "<think>\nHm.\n</think>\n\nYes.\n", [ReasoningPiece("Hm."), TextPiece("Yes.\n")]),
    ("think", "a < b and <thin", [TextPiece("a < b and <thin")]),
    ("hermes", 'Ok.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [TextPiece("Ok."), *ONE_CALL]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>\n', ONE_CALL),
    ("hermes", '<tool_call>{"type": "x", "name": "f", "parameters": {"a": 1}, "id": [2]}</tool_call>', ONE_CALL),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}', ONE_CALL),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool', ONE_CALL),
    (
        "hermes",
        '<tool_call>{"name": "f"}</tool_call>',
        [ToolCallBegin(0, "f"), ToolCallArguments(0, "{}"), ToolCallEnd(0)],
    ),
    ("hermes", "<think>a <tool_call> b</think>c", [ReasoningPiece("a <tool_call> b"), TextPiece("c")]),
    ("hermes", "</think> stays", [TextPiece("</think> stays")]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", "strings"),
    ("qwen3_coder", "<function=f><parameter=a>1</parameter></function>", "strings"),
    ("glm", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "strings"),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", "strings"),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', ONE_CALL),
    ("llama3", '\n{"type": "function", "name": "f", "parameters": {"a": 1}}\n', ONE_CALL),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ONE_CALL),
    ("llama3", '{"name": "Ann", "parameters": {}}', [TextPiece('{"name": "Ann", "parameters": {}}')]),
    ("llama3", '{"name": "f", "age": 3}', [TextPiece('{"name": "f", "age": 3}')]),
    ("llama3", JSON_ANSWER, [TextPiece(JSON_ANSWER)]),
    ("llama3", '{"a": {"name": "f"}}', [TextPiece('{"a": {"name": "f"}}')]),
    ("llama3", "  Hello", [TextPiece("  Hello")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', ONE_CALL),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}', ONE_CALL),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', ONE_CALL),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', ONE_CALL),
    ("mistral", "[THINK]Hm.[/THINK]Yes.", [ReasoningPiece("Hm."), TextPiece("Yes.")]),
    ("deepseek_v3", f'{BEGIN}{CALL}function{SEP}f\n```json\n{{"a": 1}}\n```{CALL_END}{END}', ONE_CALL),
    ("deepseek_v3", f'{BEGIN}{CALL}function{SEP}f\n{{"a": 1}}{CALL_END}{END}', ONE_CALL),
    ("deepseek_v31", f'Ok.\n\n{BEGIN}{CALL}f{SEP}{{"a": 1}}{CALL_END}{END}', [TextPiece("Ok."), *ONE_CALL]),
    ("kimi_k2", f'{KIMI}{{"a": 1}}<|tool_call_end|><|tool_calls_section_end|>', ONE_CALL),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        [ReasoningPiece("Hm."), TextPiece("Yes.")],
    ),
    ("harmony", '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>', ONE_CALL),
    ("harmony", '<|channel|>commentary to=functions.f<|constrain|>json<|message|>{"a": 1}', ONE_CALL),
    ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', ONE_CALL),
    ("harmony", '<|channel|>analysis to=functions.f code<|message|>\n{"a": 1}<|call|>', ONE_CALL),
    ("harmony", "<|channel|>commentary<|message|>My plan.<|end|>", [TextPiece("My plan.")]),
    ("harmony", "<|channel|>final<|message|>Ye", [TextPiece("Ye")]),
    ("harmony", "<|channel|>final<|mess", []),
    ("harmony", '{"a": 1}', [TextPiece('{"a": 1}')]),
    ("harmony", "<", [TextPiece("<")]),
]


@pytest.mark.parametrize(("name", "answer", "events"), CASES)
def test_an_answer_as_the_family_writes_it(name, answer, events):
    if events == "strings":
        events = [ToolCallBegin(0, "f"), ToolCallArguments(0, '{"a": "1"}'), ToolCallEnd(0)]
    assert parse(name, answer) == events
    assert parse(name, list(answer)) == events


@pytest.mark.parametrize("name", CALLING)
def test_what_the_writer_writes_is_read_back(name):
    form = load_format(name)
    calls = [
        WrittenCall("get_weather", '{"city": "Zürich \\"\\\\ 🦆", "days": 3, "hourly": true, "where": {"a": [null]}}'),
        WrittenCall("f", "{}"),
        WrittenCall("get_weather", '{"city": ""}'),
    ]
    reasoning = "Which city?" if form.reasoning else ""
    events = parse(name, write_answer(form, "Let me look.", reasoning, calls))
    assert [event.text for event in events if isinstance(event, ReasoningPiece)] == ([reasoning] if reasoning else [])
    assert text_of(events) == "Let me look."
    read = [(called, json.loads(arguments), whole) for called, arguments, whole in calls_of(events)]
    assert read == [(call.name, json.loads(call.arguments), True) for call in calls]


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_that_the_prompt_began_goes_on(name):
    form = load_format(name)
    whole = write_answer(form, "Yes.", "Hm.")
    opening = form.reasoning_prompt
    assert form.starts_in_reasoning(f"<user>Well?\n{opening}\n")
    assert not form.starts_in_reasoning(f"{opening} x")
    assert not form.starts_in_reasoning("")
    events = parse(name, whole.removeprefix(opening), starts_in_reasoning=True)
    assert events == [ReasoningPiece("Hm."), TextPiece(text_of(events))]
    assert text_of(events).strip() == "Yes."


@pytest.mark.parametrize("name", FORMATS)
def test_without_tools_no_call_is_found(name):
    form = load_format(name)
    calls = [WrittenCall("f", '{"a": 1}')] if form.has_calls else []
    assert calls_of(parse(name, write_answer(form, "Hi.", "", calls), tools=())) == []


def test_an_answer_in_json_is_text_where_there_are_no_tools():
    answer = '{"name": "f", "parameters": {"a": 1}}'
    assert parse("llama3", answer, tools=()) == [TextPiece(answer)]


@pytest.mark.parametrize("name", [name for name in CALLING if name != "llama3"])
def test_a_call_of_an_unknown_tool_is_passed_on(name):
    answer = write_answer(load_format(name), "", "", [WrittenCall("unheard_of", "{}")])
    assert calls_of(parse(name, answer)) == [("unheard_of", "{}", True)]


@pytest.mark.parametrize("name", CALLING)
def test_a_call_that_is_cut_off_has_no_end_and_invents_nothing(name):
    form = load_format(name)
    whole = write_answer(form, "", "", [WrittenCall("get_weather", '{"city": "Paris", "where": {"b": [1, 2]}}')])
    ((_, complete, _),) = calls_of(parse(name, whole))
    lengths = set()
    for at in range(len(whole)):
        for called, arguments, is_whole in calls_of(parse(name, whole[:at])):
            assert called == "get_weather"
            assert complete.startswith(arguments)
            assert is_whole is False or arguments == complete
            lengths.add(len(arguments))
    assert len(lengths) > 5


def test_typed_parameters_become_json_by_the_schema():
    parameters = {
        "city": "3", "days": "3", "hourly": "True", "where": '{"a": 1}', "any": "[1, 2]", "unknown": "4",
    }  # fmt: skip
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    ((_, arguments, _),) = calls_of(parse("qwen3_coder", f"<function=get_weather>\n{body}</function>", TOOLS))
    assert arguments == ('{"city": "3", "days": 3, "hourly": true, "where": {"a": 1}, "any": [1, 2], "unknown": "4"}')


@pytest.mark.parametrize("value", ["x", "1.5", "[3]", "{", "1e", "NaN", ""])
def test_a_value_that_is_not_of_its_type_is_a_string(value):
    answer = f"<function=get_weather><parameter=days>{value}</parameter></function>"
    ((_, arguments, is_whole),) = calls_of(parse("qwen3_coder", answer))
    assert is_whole
    assert json.loads(arguments) == {"days": value}


def test_only_one_line_break_beside_a_value_is_the_markers():
    answer = "<function=f><parameter=a>\n\n x\n\n</parameter></function>"
    assert calls_of(parse("qwen3_coder", answer)) == [("f", '{"a": "\\n x\\n"}', True)]
