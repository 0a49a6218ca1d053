"""Turns that exclude themselves, and when an answer counts as a call."""

import pytest

from zif.contract import SamplingParams, StructuredOutput
from zif.errors import RequestError
from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.parsing.formats import load_format
from zif.serving.answers import SampleDelta
from zif.serving.chat.formats import ChatFormat
from zif.serving.chat.plans import plan_answer
from zif.serving.chat.service import ChatSample
from zif.serving.chat.turn import ChatTurn, ToolChoice, ToolMode, check_tools
from zif.serving.tools.forced import required_calls_schema

TOOL = {"type": "function", "function": {"name": "look"}}
BEGIN, ARGUMENTS, END = ToolCallBegin(0, "look"), ToolCallArguments(0, '{"a": 1'), ToolCallEnd(0)


class Scripted:
    """A parser that finds what it is told."""

    def __init__(self, events):
        self.events = events

    def feed(self, text):
        return self.events

    def finish(self):
        return []


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([TextPiece("hi")], "stop"),
        ([BEGIN, ARGUMENTS, END], "tool_calls"),
        ([BEGIN, ARGUMENTS], "stop"),
        ([BEGIN, ARGUMENTS, END, ToolCallBegin(1, "look")], "stop"),
    ],
)
def test_only_calls_that_have_ended_are_calls(events, expected):
    sample = ChatSample(Scripted(events), in_reasoning=False, parallel_calls=True)
    assert sample.take(SampleDelta(0, "x", [1], finish_reason="stop")).finish_reason == expected


FORM = StructuredOutput(json_object=True)


def plan(mode, form=None, strict=(), family="hermes", **options):
    sampling = SamplingParams(structured=form, **options)
    choice = ToolChoice(mode, "look")
    turn = ChatTurn(messages=[], sampling=sampling, tools=[TOOL], tool_choice=choice, strict_tools=frozenset(strict))
    check_tools(turn)
    chat_format = ChatFormat(load_format(family))
    return plan_answer(turn, chat_format, chat_format.call_grammar({}.get, [0]), "a prompt")


@pytest.mark.parametrize(
    ("mode", "form", "strict", "kept", "alternative"),
    [
        (ToolMode.AUTO, None, (), False, False),
        (ToolMode.AUTO, None, ("look",), True, False),
        (ToolMode.AUTO, FORM, (), True, True),
        (ToolMode.NONE, FORM, ("look",), True, False),
        (ToolMode.NONE, None, ("look",), False, False),
        (ToolMode.REQUIRED, FORM, (), True, False),
        (ToolMode.NAMED, FORM, ("look",), True, False),
    ],
)
def test_tools_and_forms_say_how_an_answer_is_held(mode, form, strict, kept, alternative):
    structured = plan(mode, form, strict).sampling.structured
    assert (structured is not None) == kept
    assert kept is False or (structured.or_grammar is not None) == alternative
    if mode in (ToolMode.REQUIRED, ToolMode.NAMED):
        assert structured != form


def test_strict_tools_and_an_answer_without_end_exclude_each_other():
    with pytest.raises(RequestError, match="ignore_eos=True excludes strict tools"):
        plan(ToolMode.AUTO, strict=("look",), ignore_eos=True)


def test_strict_tools_of_a_family_that_calls_none_are_kept_by_calling_none():
    assert plan(ToolMode.AUTO, strict=("look",), family="plain").sampling.structured is None
    with pytest.raises(RequestError, match="has no calls"):
        plan(ToolMode.AUTO, FORM, family="plain")


def test_references_of_a_tools_schema_lead_to_that_schema():
    functions = [
        {"name": "plain", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        {
            "name": "list",
            "parameters": {"type": "object", "properties": {"next": {"$ref": "#"}, "v": {"$ref": "#/$defs/v"}}},
        },
    ]
    schema = required_calls_schema(functions, parallel=True)
    assert list(schema["$defs"]) == ["tool1"]
    properties = schema["$defs"]["tool1"]["properties"]
    assert properties == {"next": {"$ref": "#/$defs/tool1"}, "v": {"$ref": "#/$defs/tool1/$defs/v"}}
    assert schema["items"]["anyOf"][1]["properties"]["parameters"] == {"$ref": "#/$defs/tool1"}
