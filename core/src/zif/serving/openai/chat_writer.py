"""A neutral chat answer, written as the chat API's object or as its chunks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from zif.parsing.events import ParseEvent, ReasoningPiece, TextPiece, ToolCallArguments, ToolCallBegin
from zif.serving.answers import PositionLogprobs
from zif.serving.chat.service import ChatAnswer, ChatDelta
from zif.serving.http.exchange import event
from zif.serving.openai.chat_answer import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    FunctionCall,
    FunctionDelta,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
)
from zif.serving.openai.chat_request import ChatRequest
from zif.serving.openai.logprobs import (
    ChatLogprobs,
    ChatTokenLogprob,
    TokenNames,
    chat_logprobs,
    prompt_logprobs,
    written,
)
from zif.serving.openai.samples import check_end
from zif.serving.openai.usage import Origin, Usage, new_call_id, usage_of

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """What a request wants to see of its answer."""

    origin: Origin
    names: TokenNames
    num_top_logprobs: int
    with_reasoning: bool
    with_token_ids: bool
    usage_at_end: bool
    usage_in_chunks: bool
    service_tier: str | UnsetType

    @classmethod
    def of(cls, body: ChatRequest, origin: Origin, names: TokenNames) -> "ChatStyle":
        """Read what a request wants."""
        options = body.stream_options
        return cls(
            origin=origin,
            names=names,
            num_top_logprobs=body.top_logprobs or 0,
            with_reasoning=body.include_reasoning is not False,
            with_token_ids=bool(body.return_token_ids),
            usage_at_end=options is not None and bool(options.include_usage),
            usage_in_chunks=options is not None and bool(options.continuous_usage_stats),
            service_tier=UNSET if body.service_tier is None else "default",
        )

    def logprobs(self, positions: Sequence[PositionLogprobs] | None) -> ChatLogprobs | None:
        """Return log-probabilities, None where there are none."""
        return None if positions is None else chat_logprobs(positions, self.num_top_logprobs, self.names)


def chat_usage(answer: ChatAnswer) -> Usage:
    """Return the counts of an answer so far."""
    return usage_of(
        answer.num_prompt_tokens,
        answer.num_completion_tokens,
        answer.num_cached_tokens,
        answer.num_reasoning_tokens,
    )


@dataclass(slots=True)
class WholeSample:
    """One sample, collected."""

    style: ChatStyle
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)
    logprobs: list[ChatTokenLogprob] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: int | str | None = None

    def take(self, delta: ChatDelta) -> None:
        """Add a delta. Raises ApiError for an end that the API has no finish reason for."""
        check_end(delta.finish_reason, delta.error)
        for parsed in delta.events:
            self._take_event(parsed)
        self.token_ids += delta.token_ids
        if (found := self.style.logprobs(delta.logprobs)) is not None:
            self.logprobs = self.logprobs if self.logprobs is not None else []
            self.logprobs += map(written, found.content)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_reason = delta.stop_reason if delta.finish_reason else self.stop_reason

    def _take_event(self, found: ParseEvent) -> None:
        match found:
            case TextPiece(text):
                self.text.append(text)
            case ReasoningPiece(text):
                self.reasoning.append(text)
            case ToolCallBegin(name=name):
                self.calls.append((name, []))
            case ToolCallArguments(text=text):
                self.calls[-1][1].append(text)

    def choice(self, index: int) -> ChatChoice:
        """Return the sample as the API writes it."""
        calls = [ToolCall(new_call_id(), FunctionCall(name, "".join(pieces))) for name, pieces in self.calls]
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        message = ChatMessage(
            content=None if not text.strip() and (calls or reasoning) else text,
            reasoning_content=reasoning if reasoning and self.style.with_reasoning else UNSET,
            tool_calls=calls or UNSET,
        )
        return ChatChoice(
            index=index,
            message=message,
            finish_reason=self.finish_reason,
            logprobs=None if self.logprobs is None else ChatLogprobs(self.logprobs),
            stop_reason=UNSET if self.stop_reason is None else self.stop_reason,
            token_ids=self.token_ids if self.style.with_token_ids else UNSET,
        )


async def completion_of(answer: ChatAnswer, samples: Sequence[WholeSample], style: ChatStyle) -> ChatCompletion:
    """Return the whole answer."""
    origin, positions = style.origin, answer.prompt_logprobs
    return ChatCompletion(
        id=origin.id,
        created=origin.created,
        model=origin.model,
        system_fingerprint=origin.system_fingerprint,
        choices=[sample.choice(index) for index, sample in enumerate(samples)],
        usage=chat_usage(answer),
        service_tier=style.service_tier,
        prompt_logprobs=UNSET if positions is None else await prompt_logprobs(positions),
        prompt_token_ids=answer.prompt_token_ids if style.with_token_ids else UNSET,
    )


class ChunkWriter:
    """Writes the chunks of one stream."""

    def __init__(self, answer: ChatAnswer, style: ChatStyle) -> None:
        self._answer = answer
        self._style = style

    def first(self, num_samples: int) -> bytes:
        """Return the chunk that says who speaks, for every sample."""
        deltas = (MessageDelta(role="assistant", content="", refusal=None) for _ in range(num_samples))
        chunk = self._chunk([ChunkChoice(index, delta) for index, delta in enumerate(deltas)])
        if self._style.with_token_ids:
            chunk.prompt_token_ids = self._answer.prompt_token_ids
        return event(_encode(chunk))

    def chunk(self, delta: ChatDelta) -> bytes:
        """Return the chunk of a delta; empty when it shows nothing. Raises ApiError for an end by a fault."""
        check_end(delta.finish_reason, delta.error)
        shown = self._message_delta(delta.events)
        logprobs = self._style.logprobs(delta.logprobs)
        says_tokens = bool(delta.token_ids) and self._style.with_token_ids
        if shown is None and delta.finish_reason is None and logprobs is None and not says_tokens:
            return b""
        choice = ChunkChoice(
            index=delta.index,
            delta=shown or MessageDelta(),
            finish_reason=delta.finish_reason,
            logprobs=logprobs,
            stop_reason=UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if self._style.with_token_ids else UNSET,
        )
        return event(_encode(self._chunk([choice])))

    def last(self) -> bytes:
        """Return what ends the stream: the usage if it was asked for, and the mark of the end."""
        if not self._style.usage_at_end:
            return event(b"[DONE]")
        chunk = self._chunk([])
        chunk.usage = chat_usage(self._answer)
        return event(_encode(chunk)) + event(b"[DONE]")

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        style = self._style
        usage: Usage | UnsetType | None = None if style.usage_at_end else UNSET
        if style.usage_in_chunks:
            usage = chat_usage(self._answer)
        return ChatChunk(
            id=style.origin.id,
            created=style.origin.created,
            model=style.origin.model,
            system_fingerprint=style.origin.system_fingerprint,
            choices=choices,
            service_tier=style.service_tier,
            usage=usage,
        )

    def _message_delta(self, events: Iterable[ParseEvent]) -> MessageDelta | None:
        text, reasoning = "", ""
        calls: dict[int, ToolCallDelta] = {}
        for found in events:
            match found:
                case TextPiece(piece):
                    text += piece
                case ReasoningPiece(piece):
                    reasoning += piece if self._style.with_reasoning else ""
                case ToolCallBegin(index, name):
                    calls[index] = ToolCallDelta(index, FunctionDelta(name, ""), new_call_id(), "function")
                case ToolCallArguments(index, piece):
                    call = calls.setdefault(index, ToolCallDelta(index, FunctionDelta(arguments="")))
                    call.function.arguments = (call.function.arguments or "") + piece
        if not text and not reasoning and not calls:
            return None
        return MessageDelta(
            content=text or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=list(calls.values()) or UNSET,
        )
