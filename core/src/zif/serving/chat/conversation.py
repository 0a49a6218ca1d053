"""A chat as templates take it, built from APIs that send it in smaller pieces: blocks of a message, or items.

Neighbouring pieces of one speaker become one message, because many templates refuse two in a row. The messages of
Anthropic's API and of the Responses API are built with it; those of the chat API have this form already.
"""

from collections.abc import Mapping
from typing import Any

from zif.errors import RequestError

TOOL_NAME = r"^[a-zA-Z0-9_-]{1,128}$(?!\n)"
"""What tools may be called. `$` alone matches before a last line break; every dialect has the look-ahead."""

ERROR_PREFIX = "Error: "
"""Goes before a tool's result that is an error: the form of templates has no other place that says so."""


class Conversation:
    """Messages under construction. Pieces are added in the order in which they were said."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._tool_names: dict[str, str] = {}
        self._unanswered: set[str] = set()

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """Return the messages so far, in the form of `zif.serving.chat.turn.ChatTurn`."""
        return [_finished(message) for message in self._messages]

    @property
    def ends_with_text_of_assistant(self) -> bool:
        """Say whether the last message is an assistant's that a model could go on with."""
        last = self._messages[-1] if self._messages else {}
        return last.get("role") == "assistant" and bool(last["content"]) and "tool_calls" not in last

    @property
    def ends_with_assistant(self) -> bool:
        """Say whether the assistant spoke last."""
        return bool(self._messages) and self._messages[-1]["role"] == "assistant"

    def add_text(self, role: str, text: str) -> None:
        """Add what `role` ("system", "user" or "assistant") said."""
        self._open(role)["content"].append(text)

    def add_reasoning(self, text: str) -> None:
        """Add what the assistant thought."""
        self._open("assistant").setdefault("reasoning_content", []).append(text)

    def add_tool_call(self, call_id: str, name: str, arguments: Mapping[str, Any] | str) -> None:
        """Add a call by the assistant; arguments are an object or JSON text. Raises RequestError for an id twice."""
        if call_id in self._tool_names:
            raise RequestError(f"two tool calls have the id {call_id!r}; give each call an id of its own")
        self._tool_names[call_id] = name
        self._unanswered.add(call_id)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._open("assistant").setdefault("tool_calls", []).append(call)

    def add_tool_result(self, call_id: str, text: str, is_error: bool = False) -> None:
        """Add what a tool answered. Raises RequestError for a call that was not made, or was answered before."""
        if call_id not in self._tool_names:
            raise RequestError(f"a tool result answers the call {call_id!r}, which no message before it made")
        if call_id not in self._unanswered:
            raise RequestError(f"the tool call {call_id!r} has two results; send one for each call")
        self._unanswered.discard(call_id)
        message = {
            "role": "tool",
            "tool_call_id": call_id,
            "name": self._tool_names[call_id],
            "content": [ERROR_PREFIX + text if is_error else text],
        }
        self._messages.append(message)

    def _open(self, role: str) -> dict[str, Any]:
        """Return the message that more of `role` goes to."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]


def _finished(message: Mapping[str, Any]) -> dict[str, Any]:
    finished = {**message, "content": _content(message)}
    if "reasoning_content" in message:
        finished["reasoning_content"] = "".join(message["reasoning_content"])
    return finished


def _content(message: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Return one text as a string, several as parts, which templates that want a string get joined."""
    texts: list[str] = message["content"]
    if not texts:
        return None if "tool_calls" in message else ""
    if len(texts) == 1:
        return texts[0]
    return [{"type": "text", "text": text} for text in texts]
