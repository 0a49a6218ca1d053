"""Messages built from pieces, as templates take them."""

import pytest

from zif.errors import RequestError
from zif.serving.chat.conversation import Conversation


def test_pieces_of_one_turn_become_one_message():
    chat = Conversation()
    chat.add_text("system", "s")
    chat.add_text("user", "a")
    chat.add_text("user", "b")
    chat.add_reasoning("r")
    chat.add_tool_call("1", "f", {"x": 1})
    chat.add_tool_call("2", "g", "{}")
    chat.add_tool_result("2", "two")
    chat.add_tool_result("1", "one", is_error=True)
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert chat.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "name": "g", "content": "two"},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "Error: one"},
    ]


@pytest.mark.parametrize("call_id", ["unknown", "answered"])
def test_a_result_answers_a_call_once(call_id):
    chat = Conversation()
    chat.add_tool_call("answered", "f", {})
    chat.add_tool_result("answered", "x")
    with pytest.raises(RequestError, match=call_id):
        chat.add_tool_result(call_id, "x")


def test_calls_have_ids_of_their_own():
    chat = Conversation()
    chat.add_tool_call("1", "f", {})
    with pytest.raises(RequestError, match="'1'"):
        chat.add_tool_call("1", "f", {})


def test_only_text_can_be_continued():
    chat = Conversation()
    assert not chat.ends_with_assistant
    chat.add_reasoning("r")
    assert chat.ends_with_assistant
    assert not chat.ends_with_text_of_assistant
    chat.add_text("assistant", "a")
    assert chat.ends_with_text_of_assistant
    chat.add_tool_call("1", "f", {})
    assert not chat.ends_with_text_of_assistant
