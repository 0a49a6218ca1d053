"""Answers as responses: the output items of one, and the numbered events that a stream writes it with.

Each item begins with output_item.added and ends with output_item.done; text and reasoning are content parts within
theirs, arguments of calls have deltas of their own. Source: the API reference of OpenAI, and Open Responses.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import msgspec

from zif.serving.answer_parts import AnswerParts, Part, PartBegun, PartEnded, PartEvent, PartGrown, PartKind
from zif.serving.chat.service import ChatAnswer, ChatDelta
from zif.serving.http.errors import Failure, FailureKind
from zif.serving.http.exchange import event
from zif.serving.ids import new_id
from zif.serving.openai.usage import new_call_id

DONE = event(b"[DONE]")
"""Ends a stream in Open Responses; OpenAI's clients stop there too."""

ID_KINDS = {PartKind.TEXT: "msg", PartKind.REASONING: "rs", PartKind.CALL: "fc"}
FAILURE_CODES = {FailureKind.OVERLOADED: "rate_limit_exceeded", FailureKind.INVALID: "invalid_prompt"}


class ResponseUsage(TypedDict):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(TypedDict):
    """A response, whole or so far, without the options that it repeats of its request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    model: str


class InputTokens(TypedDict):
    """How long a prompt is."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseWriter:
    """Writes one answer as a response. Feed it each delta; then `response` is whole.

    `echo` holds the fields that say what was asked, as `zif.serving.responses.echo` gives them.
    """

    def __init__(self, answer: ChatAnswer, echo: dict[str, Any]) -> None:
        self._id = new_id("resp")
        self._answer = answer
        self._echo = echo
        self._created_s = int(time.time())
        self._completed_s: int | None = None
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._parts = AnswerParts()
        self._ids: dict[int, str] = {}
        self._call_ids: dict[int, str] = {}
        self._num_events = 0

    def take(self, delta: ChatDelta) -> list[PartEvent]:
        """Take what the sample got; return what it means for the items."""
        found = self._parts.take(delta.events)
        if delta.finish_reason is not None:
            found += self._parts.finish()
            self._status = "incomplete" if delta.finish_reason == "length" else "completed"
            self._completed_s = int(time.time())
        return found

    def response(self) -> dict[str, Any]:
        """Return the response as it stands."""
        ended = self._status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "completed_at": self._completed_s if self._status == "completed" else None,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "output": [self._item(part, self._status_of(part)) for part in self._parts.parts] if ended else [],
            "usage": self._usage() if ended else None,
            **self._echo,
        }

    def begin(self) -> bytes:
        """Return the events that open a stream; call it before the first delta is taken."""
        return self._state("response.created") + self._state("response.in_progress")

    def frames(self, found: Sequence[PartEvent]) -> bytes:
        """Return the events that tell a client of changes of items."""
        return b"".join(frame for change in found for frame in self._frames_of(change))

    def end(self) -> bytes:
        """Return the events that close a stream whose answer has ended."""
        assert self._status != "in_progress", "an engine's answer ends with a reason"
        return self._state(f"response.{self._status}") + DONE

    def fail(self, failure: Failure) -> bytes:
        """Return the events that close a stream that something went wrong with."""
        code = FAILURE_CODES.get(failure.kind, "server_error")
        self._status = "failed"
        self._error = {"code": code, "message": failure.message}
        error = self._frame("error", code=code, message=failure.message, param=failure.param)
        return error + self._state("response.failed") + DONE

    def _state(self, name: str) -> bytes:
        return self._frame(name, response=self.response())

    def _frame(self, kind: str, /, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event(msgspec.json.encode(value), kind)

    def _frames_of(self, change: PartEvent) -> list[bytes]:
        part = change.part
        match change:
            case PartBegun():
                return self._begun(part)
            case PartGrown(text=text):
                return [self._delta(part, text)]
            case PartEnded():
                return self._ended(part)

    def _begun(self, part: Part) -> list[bytes]:
        item = self._item(part, "in_progress", opening=True)
        added = self._frame("response.output_item.added", output_index=part.index, item=item)
        if part.kind is PartKind.CALL:
            return [added]
        return [added, self._frame("response.content_part.added", **self._place(part), part=_content(part, ""))]

    def _delta(self, part: Part, text: str) -> bytes:
        if part.kind is PartKind.TEXT:
            return self._frame("response.output_text.delta", **self._place(part), delta=text, logprobs=[])
        if part.kind is PartKind.REASONING:
            return self._frame("response.reasoning_text.delta", **self._place(part), delta=text)
        return self._frame("response.function_call_arguments.delta", **self._place(part), delta=text)

    def _ended(self, part: Part) -> list[bytes]:
        text = part.text
        item = self._item(part, self._status_of(part))
        if part.kind is PartKind.CALL:
            name = "response.function_call_arguments.done"
            frames = [self._frame(name, **self._place(part), name=part.name, arguments=text)]
        else:
            is_text = part.kind is PartKind.TEXT
            name = "response.output_text.done" if is_text else "response.reasoning_text.done"
            more: dict[str, Any] = {"logprobs": []} if is_text else {}
            frames = [
                self._frame(name, **self._place(part), text=text, **more),
                self._frame("response.content_part.done", **self._place(part), part=_content(part, text)),
            ]
        return [*frames, self._frame("response.output_item.done", output_index=part.index, item=item)]

    def _place(self, part: Part) -> dict[str, Any]:
        """Return the fields that tell where a delta belongs."""
        place: dict[str, Any] = {"item_id": self._item_id(part), "output_index": part.index}
        return place if part.kind is PartKind.CALL else {**place, "content_index": 0}

    def _item(self, part: Part, status: str, opening: bool = False) -> dict[str, Any]:
        """Return an output item; when it is `opening` what it holds is left out."""
        text = "" if opening else part.text
        content = [] if opening else [_content(part, text)]
        item: dict[str, Any] = {"id": self._item_id(part), "status": status}
        if part.kind is PartKind.TEXT:
            return {"type": "message", **item, "role": "assistant", "content": content}
        if part.kind is PartKind.REASONING:
            return {"type": "reasoning", **item, "summary": [], "content": content}
        call_id = self._call_ids.setdefault(part.index, new_call_id())
        return {"type": "function_call", **item, "call_id": call_id, "name": part.name, "arguments": text}

    def _status_of(self, part: Part) -> str:
        """Return the status of an item that ended: the last one may have been cut off."""
        is_last = part is self._parts.parts[-1]
        cut = is_last and self._status in ("incomplete", "failed")
        return "completed" if part.whole and not cut else "incomplete"

    def _item_id(self, part: Part) -> str:
        return self._ids.setdefault(part.index, new_id(ID_KINDS[part.kind]))

    def _usage(self) -> ResponseUsage:
        num_input, num_output = self._answer.num_prompt_tokens, self._answer.num_completion_tokens
        return {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": self._answer.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._answer.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind is PartKind.REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
