"""Requests of the Responses API as chats: items to messages, tools and options, in the words of `ChatTurn`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from zif.contract import SamplingParams, StructuredOutput
from zif.serving.chat.conversation import Conversation
from zif.serving.chat.turn import ChatTurn, ToolChoice, ToolMode
from zif.serving.openai.fields import invalid, refuse
from zif.serving.responses.requests import (
    REFUSED,
    REFUSED_CREATE,
    AllowedTools,
    CountInputTokens,
    CreateResponse,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionTool,
    InputText,
    JsonObjectFormat,
    JsonSchemaFormat,
    MessageItem,
    NamedFunction,
    OutputText,
    Part,
    ReasoningItem,
    Refused,
)

S = TypeVar("S", bound=msgspec.Struct)

ITEMS: Mapping[str, type[msgspec.Struct]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}
EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Templates that read an effort know three."""


@dataclass(frozen=True, slots=True)
class AskedTools:
    """The tools of a request, and which of them may be called."""

    tools: list[FunctionTool]
    allowed: list[FunctionTool]
    choice: ToolChoice


def chat_of(body: CountInputTokens, default_sampling: SamplingParams) -> ChatTurn:
    """Return the chat that a request asks about. Raises ApiError for what is not served, by name."""
    _refuse(body)
    asked = tools_of(body)
    return ChatTurn(
        messages=_messages(body),
        sampling=_sampling(body, default_sampling),
        tools=[_as_templates_take_it(tool) for tool in asked.allowed],
        tool_choice=asked.choice,
        strict_tools=frozenset(tool.name for tool in asked.allowed if tool.strict),
        reasoning=_reasoning(body, asked.choice),
        variables=_variables(body),
        cache_salt=(body.cache_salt or "") if isinstance(body, CreateResponse) else "",
    )


def tools_of(body: CountInputTokens) -> AskedTools:
    """Return the tools of a request. Raises ApiError for tools and choices that are not served."""
    tools = [_tool(index, tool) for index, tool in enumerate(body.tools or ())]
    parallel = body.parallel_tool_calls is not False
    asked = body.tool_choice
    if not isinstance(asked, dict):
        return AskedTools(tools, tools, ToolChoice(ToolMode(asked or "auto"), parallel=parallel))
    if asked.get("type") == "function":
        named = _convert(asked, NamedFunction, "tool_choice")
        return AskedTools(tools, tools, ToolChoice(ToolMode.NAMED, named.name, parallel))
    if asked.get("type") != "allowed_tools":
        raise invalid(
            f"'tool_choice' is of type {_shown(asked.get('type'))}, which is not served; use 'function',"
            " 'allowed_tools', or one of none, auto, required",
            "tool_choice",
        )
    allowed = _convert(asked, AllowedTools, "tool_choice")
    names = {function.name for function in allowed.tools}
    unknown = names - {tool.name for tool in tools}
    if unknown:
        raise invalid(f"'tool_choice.tools' names {min(unknown)!r}, which is none of the tools", "tool_choice.tools")
    kept = [tool for tool in tools if tool.name in names]
    return AskedTools(tools, kept, ToolChoice(ToolMode(allowed.mode), parallel=parallel))


def _refuse(body: CountInputTokens) -> None:
    refuse(body, REFUSED_CREATE if isinstance(body, CreateResponse) else REFUSED)
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise invalid("'text.verbosity' is not supported: ask for it in a message; leave it out", "text.verbosity")
    if isinstance(body, CreateResponse):
        _refuse_options(body)


def _refuse_options(body: CreateResponse) -> None:
    if body.include and "message.output_text.logprobs" in body.include:
        raise invalid("'include' asks for log-probabilities, which are served at /v1/chat/completions", "include")
    options = body.stream_options
    if options is None:
        return
    if not body.stream:
        raise invalid("'stream_options' is only taken with stream=true; leave it out", "stream_options")
    for name in ("include_obfuscation", "include_usage", "continuous_usage_stats"):
        if getattr(options, name):
            place = f"stream_options.{name}"
            raise invalid(f"'{place}' is not supported: usage comes at the end, events are not padded", place)


def _messages(body: CountInputTokens) -> list[Mapping[str, Any]]:
    conversation = Conversation()
    if body.instructions:
        conversation.add_text("system", body.instructions)
    if isinstance(body.input, str):
        conversation.add_text("user", body.input)
        return conversation.messages
    for index, item in enumerate(body.input):
        _add(conversation, item, f"input[{index}]")
    return conversation.messages


def _add(conversation: Conversation, raw: Mapping[str, Any], place: str) -> None:
    kind = raw.get("type", "message")
    if not isinstance(kind, str) or kind not in ITEMS:
        raise invalid(
            f"'{place}' is of type {_shown(kind)}, which is not served; use one of: {', '.join(ITEMS)}",
            f"{place}.type",
        )
    match _convert(raw, ITEMS[kind], place):
        case MessageItem(role=role, content=content):
            # Templates know no developer; what it says is what the system says.
            speaker = "system" if role == "developer" else role
            for text in _texts(content, place):
                conversation.add_text(speaker, text)
        case FunctionCallItem(async_=True):
            raise invalid(f"'{place}.async' is not supported: no tools are run here", f"{place}.async")
        case FunctionCallItem() as call:
            conversation.add_tool_call(call.call_id, call.name, call.arguments)
        case FunctionCallOutputItem() as result:
            conversation.add_tool_result(result.call_id, "\n".join(_texts(result.output, place)))
        case ReasoningItem() as reasoning:
            _add_reasoning(conversation, reasoning, place)


def _add_reasoning(conversation: Conversation, item: ReasoningItem, place: str) -> None:
    pieces = item.content or item.summary or ()
    if item.encrypted_content is not None and not pieces:
        place = f"{place}.encrypted_content"
        raise invalid(f"'{place}' can only be read by the service that wrote it; leave the item out", place)
    conversation.add_reasoning("\n".join(piece.text for piece in pieces))


def _texts(content: str | Sequence[Part], place: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [_text(part, f"{place}.content[{index}]") for index, part in enumerate(content)]


def _text(part: Part, place: str) -> str:
    match part:
        case InputText(text=text) | OutputText(text=text):
            return text
        case Refused(refusal=text):
            return text
    kind = str(part.__struct_config__.tag)
    raise invalid(f"'{place}' is of type {kind!r}, which is not supported: the model reads text only", place)


def _tool(index: int, raw: Mapping[str, Any]) -> FunctionTool:
    place = f"tools[{index}]"
    if raw.get("type") != "function":
        raise invalid(
            f"'{place}' is of type {_shown(raw.get('type'))}, a tool that is not served here; only type 'function' is",
            f"{place}.type",
        )
    tool = _convert(raw, FunctionTool, place)
    refused = {"defer_loading": tool.defer_loading, "output_schema": tool.output_schema, "async": tool.async_}
    for name, value in refused.items():
        if value is not None and value is not False:
            raise invalid(f"'{place}.{name}' is not supported: no tools are loaded or run here", f"{place}.{name}")
    return tool


def _as_templates_take_it(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or {"type": "object"}}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _reasoning(body: CountInputTokens, choice: ToolChoice) -> bool | None:
    effort = None if body.reasoning is None else body.reasoning.effort
    if effort == "none":
        return False
    # A constrained answer has no room for reasoning before it.
    return None if effort is None or choice.forced or _structured(body) is not None else True


def _variables(body: CountInputTokens) -> dict[str, str]:
    effort = None if body.reasoning is None else body.reasoning.effort
    return {} if effort in (None, "none") else {"reasoning_effort": EFFORTS.get(effort, effort)}


def _sampling(body: CountInputTokens, default: SamplingParams) -> SamplingParams:
    if not isinstance(body, CreateResponse):
        return replace(default, structured=_structured(body))
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "seed")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    return replace(default, **given, max_tokens=body.max_output_tokens, structured=_structured(body))


def _structured(body: CountInputTokens) -> StructuredOutput | None:
    match None if body.text is None else body.text.format:
        case JsonSchemaFormat(schema=schema):
            return StructuredOutput(json=schema)
        case JsonObjectFormat():
            return StructuredOutput(json_object=True)
    return None


def _convert(value: Mapping[str, Any], kind: type[S], place: str) -> S:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise invalid(f"'{place}': {error}", place) from error


def _shown(kind: object) -> str:
    return repr(kind[:64]) if isinstance(kind, str) else "no type" if kind is None else "no name"
