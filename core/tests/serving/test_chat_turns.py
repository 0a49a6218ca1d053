"""Turns that exclude themselves, and when an answer counts as a call."""

import pytest

from zif.contract import SamplingParams, StructuredOutput
from zif.errors import RequestError
from zif.parsing.events import TextPiece, ToolCallArguments, ToolCallBegin, ToolCallEnd
from zif.serving.answers import SampleDelta
from zif.serving.chat_service import ChatSample
from zif.serving.chat_turn import ChatTurn, ToolChoice, ToolMode, check_tools
from zif.serving.tool_constraints import required_calls_schema

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


def turn(mode):
    sampling = SamplingParams(structured=StructuredOutput(json_object=True))
    return ChatTurn(messages=[], tools=[TOOL], tool_choice=ToolChoice(mode), sampling=sampling)


@pytest.mark.parametrize("mode", [ToolMode.AUTO, ToolMode.REQUIRED])
def test_tools_and_a_form_exclude_each_other(mode):
    with pytest.raises(RequestError, match="exclude each other"):
        check_tools(turn(mode))


def test_tools_that_are_not_to_be_called_go_with_a_form():
    check_tools(turn(ToolMode.NONE))


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
