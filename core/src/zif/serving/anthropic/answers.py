"""Answers as messages: the blocks of one, and the events that a stream writes it with.

The order of events is that of the API: message_start; for each block content_block_start, its deltas,
content_block_stop; message_delta with the reason and the counts; message_stop. Source: docs.anthropic.com, "Streaming".
"""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import msgspec

from zif.serving.answer_parts import AnswerParts, Part, PartBegun, PartEnded, PartEvent, PartGrown, PartKind
from zif.serving.anthropic.cut_json import readable_members
from zif.serving.chat.service import ChatAnswer, ChatDelta
from zif.serving.http.exchange import event
from zif.serving.ids import new_id
from zif.serving.openai.usage import new_call_id


class MessageUsage(TypedDict):
    """Counts of tokens. Those of the prompt that were found computed are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class MessageAnswer(TypedDict):
    """A message, whole or so far. `content` holds blocks of text, of thinking and of calls."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """How long a prompt is."""

    input_tokens: int


PING = event(b'{"type":"ping"}', "ping")


class MessageWriter:
    """Writes one answer as a message. Feed it each delta; then `message` is whole.

    `omit_thinking` leaves the thoughts' text out of what is sent, with their signature in place.
    """

    def __init__(self, model: str, answer: ChatAnswer, max_tokens: int, omit_thinking: bool = False) -> None:
        self._id = new_id("msg")
        self._model = model
        self._answer = answer
        self._max_tokens = max_tokens
        self._omit_thinking = omit_thinking
        self._parts = AnswerParts()
        self._call_ids: dict[int, str] = {}
        self._stop_reason: str | None = None
        self._stop_sequence: str | None = None

    @property
    def ended(self) -> bool:
        """Say whether the answer's last delta was taken."""
        return self._stop_reason is not None

    def take(self, delta: ChatDelta) -> list[PartEvent]:
        """Take what the sample got; return what it means for the blocks."""
        found = self._parts.take(delta.events)
        if delta.finish_reason is not None:
            found += self._parts.finish()
            self._finish(delta)
        return found

    def begin(self) -> bytes:
        """Return the event that opens a stream; the engine's first delta has told what was cached."""
        return _frame({"type": "message_start", "message": {**self.message(), "content": []}})

    def frames(self, found: Sequence[PartEvent]) -> bytes:
        """Return the events that tell a client of changes of blocks."""
        return b"".join(frame for change in found for frame in self._frames_of(change))

    def end(self) -> bytes:
        """Return the events that close a stream."""
        assert self.ended, "an engine's answer ends with a reason"
        delta = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        return _frame({"type": "message_delta", "delta": delta, "usage": self._usage()}) + _frame(
            {"type": "message_stop"}
        )

    def message(self) -> MessageAnswer:
        """Return the message as it stands."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [self._block(part) for part in self._parts.parts],
            "stop_reason": self._stop_reason,
            "stop_sequence": self._stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> MessageUsage:
        """Return the counts. Tokens that were found computed are counted apart from the others of the prompt."""
        cached = self._answer.num_cached_tokens
        return {
            "input_tokens": self._answer.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._answer.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._answer.num_reasoning_tokens},
        }

    def _finish(self, delta: ChatDelta) -> None:
        if delta.finish_reason == "tool_calls":
            self._stop_reason = "tool_use"
        elif delta.finish_reason == "length":
            within = self._answer.num_completion_tokens < self._max_tokens
            self._stop_reason = "model_context_window_exceeded" if within else "max_tokens"
        elif isinstance(delta.stop_reason, str):
            self._stop_reason = "stop_sequence"
            self._stop_sequence = delta.stop_reason
        else:
            self._stop_reason = "end_turn"

    def _frames_of(self, change: PartEvent) -> list[bytes]:
        index = change.part.index
        match change:
            case PartBegun(part):
                return [_frame({"type": "content_block_start", "index": index, "content_block": self._opening(part)})]
            case PartGrown(part, text):
                delta = self._delta(part, text)
                return [] if delta is None else [_delta_frame(index, delta)]
            case PartEnded(part):
                stop = _frame({"type": "content_block_stop", "index": index})
                if part.kind is not PartKind.REASONING:
                    return [stop]
                return [_delta_frame(index, {"type": "signature_delta", "signature": _signature(part)}), stop]

    def _delta(self, part: Part, text: str) -> dict[str, str] | None:
        if part.kind is PartKind.TEXT:
            return {"type": "text_delta", "text": text}
        if part.kind is PartKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}
        return None if self._omit_thinking else {"type": "thinking_delta", "thinking": text}

    def _opening(self, part: Part) -> dict[str, Any]:
        """Return a block before its first delta."""
        if part.kind is PartKind.TEXT:
            return {"type": "text", "text": ""}
        if part.kind is PartKind.REASONING:
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": self._call_id(part), "name": part.name, "input": {}}

    def _block(self, part: Part) -> dict[str, Any]:
        """Return a block with what it holds so far."""
        if part.kind is PartKind.TEXT:
            return {"type": "text", "text": part.text}
        if part.kind is PartKind.REASONING:
            thinking = "" if self._omit_thinking else part.text
            return {"type": "thinking", "thinking": thinking, "signature": _signature(part)}
        return {**self._opening(part), "input": readable_members(part.text)}

    def _call_id(self, part: Part) -> str:
        return self._call_ids.setdefault(part.index, new_call_id())


def _signature(part: Part) -> str:
    """Return a digest of thoughts: clients drop blocks without a signature. It is not checked when they come back."""
    return base64.b64encode(hashlib.sha256(part.text.encode("utf-8", "replace")).digest()).decode()


def _delta_frame(index: int, delta: dict[str, str]) -> bytes:
    return _frame({"type": "content_block_delta", "index": index, "delta": delta})


def _frame(value: dict[str, Any]) -> bytes:
    return event(msgspec.json.encode(value), value["type"])
