"""Requests of the Messages API as chats: system, turns of blocks, tools and options, in the words of `ChatTurn`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from zif.contract import SamplingParams, StructuredOutput
from zif.serving.anthropic.requests import (
    REFUSED,
    REFUSED_BLOCKS,
    REFUSED_CREATE,
    Block,
    CountTokens,
    CreateMessage,
    Message,
    RefusedBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from zif.serving.chat.conversation import Conversation
from zif.serving.chat.turn import ChatTurn, ToolChoice, ToolMode
from zif.serving.http.errors import ApiError
from zif.serving.openai.fields import invalid, refuse

MODES = {"auto": ToolMode.AUTO, "any": ToolMode.REQUIRED, "tool": ToolMode.NAMED, "none": ToolMode.NONE}
EFFORTS = {"xhigh": "high", "max": "high"}
"""Templates that read an effort know three."""


def chat_of(body: CountTokens, default_sampling: SamplingParams) -> ChatTurn:
    """Return the chat that a request asks about. Raises ApiError for what is not served, by name."""
    _refuse(body)
    conversation = Conversation()
    for text in _texts(body.system):
        conversation.add_text("system", text)
    for index, message in enumerate(body.messages):
        _add(conversation, message, f"messages[{index}].content")
    prefilled = conversation.ends_with_assistant
    if prefilled and not conversation.ends_with_text_of_assistant:
        raise invalid("'messages' ends with an assistant's message that has no text to go on with", "messages")
    return ChatTurn(
        messages=conversation.messages,
        sampling=_sampling(body, default_sampling),
        tools=_tools(body.tools or ()),
        tool_choice=_tool_choice(body),
        strict_tools=frozenset(str(tool["name"]) for tool in body.tools or () if tool.get("strict")),
        reasoning=_reasoning(body),
        variables=_variables(body),
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
    )


def _refuse(body: CountTokens) -> None:
    refuse(body, REFUSED_CREATE if isinstance(body, CreateMessage) else REFUSED)
    thinking = body.thinking
    if thinking is None:
        return
    if thinking.type == "between_tools":
        raise invalid("'thinking.type' 'between_tools' is not supported; use 'enabled' or 'disabled'", "thinking.type")
    if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        raise invalid("'thinking.budget_tokens' comes with type 'enabled', and only with it", "thinking.budget_tokens")
    if thinking.type == "enabled" and _is_constrained(body):
        raise invalid(
            "'thinking' cannot be enabled when 'tool_choice' forces a call or 'output_config.format' is set: both say"
            " what the whole answer is; leave one of them out",
            "thinking",
        )


def _is_constrained(body: CountTokens) -> bool:
    forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
    return forced or (body.output_config is not None and body.output_config.format is not None)


def _add(conversation: Conversation, message: Message, place: str) -> None:
    """Add one turn's blocks in order."""
    if isinstance(message.content, str):
        conversation.add_text(message.role, message.content)
        return
    for index, block in enumerate(message.content):
        _add_block(conversation, message.role, block, f"{place}[{index}]")


def _add_block(conversation: Conversation, role: str, block: Block, place: str) -> None:
    match block:
        case TextBlock(text=text):
            conversation.add_text(role, text)
        case ThinkingBlock(thinking=thinking) if role == "assistant":
            conversation.add_reasoning(thinking)
        case ToolUseBlock() if role == "assistant":
            conversation.add_tool_call(block.id, block.name, block.input)
        case ToolResultBlock() if role == "user":
            text = "\n".join(_texts(block.content, place))
            conversation.add_tool_result(block.tool_use_id, text, is_error=bool(block.is_error))
        case ThinkingBlock() | ToolUseBlock() | ToolResultBlock():
            raise invalid(f"'{place}' is of type {_tag(block)!r}, which role {role!r} cannot have", place)
        case _:
            raise _refused_block(block, place)


def _texts(content: str | Sequence[TextBlock | RefusedBlock] | None, place: str = "") -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content else []
    texts = []
    for index, block in enumerate(content):
        if not isinstance(block, TextBlock):
            raise _refused_block(block, f"{place}.content[{index}]")
        texts.append(block.text)
    return texts


def _refused_block(block: RefusedBlock, place: str) -> ApiError:
    reason = REFUSED_BLOCKS[_tag(block)]
    return invalid(f"'{place}' is of type {_tag(block)!r}, which is not supported: {reason}", place)


def _tag(block: Block) -> str:
    return str(block.__struct_config__.tag)


def _tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_tool(index, tool) for index, tool in enumerate(tools)]


def _tool(index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as templates take it. Tools that the service would run have a type of their own."""
    kind = tool.get("type")
    if kind not in (None, "custom"):
        name = kind[:64] if isinstance(kind, str) else "of an unknown type"
        message = f"'tools[{index}]' is {name!r}, a tool that is not served here; only tools of your own are"
        raise invalid(message, f"tools[{index}].type")
    try:
        checked = msgspec.convert(tool, Tool)
    except msgspec.ValidationError as error:
        raise invalid(f"'tools[{index}]': {error}", f"tools[{index}]") from error
    if checked.defer_loading:
        place = f"tools[{index}].defer_loading"
        raise invalid(f"'{place}' is not supported: all tools are given to the model at once; leave it out", place)
    function: dict[str, Any] = {"name": checked.name, "parameters": checked.input_schema}
    if checked.description is not None:
        function["description"] = checked.description
    return {"type": "function", "function": function}


def _tool_choice(body: CountTokens) -> ToolChoice:
    asked = body.tool_choice
    if asked is None:
        return ToolChoice()
    if (asked.type == "tool") != (asked.name is not None):
        raise invalid("'tool_choice.name' comes with type 'tool', and only with it", "tool_choice.name")
    return ToolChoice(MODES[asked.type], asked.name, parallel=not asked.disable_parallel_tool_use)


def _reasoning(body: CountTokens) -> bool | None:
    if body.thinking is None:
        return None
    # An adaptive model may choose not to think, and a constrained answer has no room for it.
    return body.thinking.type == "enabled" or (body.thinking.type == "adaptive" and not _is_constrained(body))


def _variables(body: CountTokens) -> dict[str, str]:
    effort = None if body.output_config is None else body.output_config.effort
    return {} if effort is None else {"reasoning_effort": EFFORTS.get(effort, effort)}


def _sampling(body: CountTokens, default: SamplingParams) -> SamplingParams:
    asked: dict[str, Any] = {"structured": _structured(body)}
    if isinstance(body, CreateMessage):
        names = ("temperature", "top_p", "top_k", "max_tokens")
        asked |= {name: getattr(body, name) for name in names} | {"stop": body.stop_sequences or None}
    return replace(default, **{name: value for name, value in asked.items() if value is not None})


def _structured(body: CountTokens) -> StructuredOutput | None:
    asked = None if body.output_config is None else body.output_config.format
    return None if asked is None else StructuredOutput(json=asked.schema)
