"""What is asked of a chat, whatever API it came by: messages, tools, and how to answer. Checked, not yet rendered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from zif.contract import SamplingParams
from zif.errors import RequestError
from zif.serving.json_text import read_json

MAX_TOOLS = 128
MAX_MESSAGES = 2048

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class ToolMode(StrEnum):
    """Whether the model may, must not or must call tools."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which calls are asked for. `name` is the tool of `NAMED`. Without `parallel` at most one call is given out."""

    mode: ToolMode = ToolMode.AUTO
    name: str | None = None
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Say whether the answer must be calls, and nothing else."""
        return self.mode in (ToolMode.REQUIRED, ToolMode.NAMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One request for the next message of a chat.

    `messages` and `tools` are in the form that chat templates take, which is that of OpenAI's chat API: a tool is
    {"type": "function", "function": {"name", "description", "parameters"}}, a call in a message has its arguments as
    JSON text or as an object, a tool's result is a message with role "tool". `sampling.max_tokens` None goes on to the
    model's length. `reasoning` asks templates that can to think first (True) or not to (False); None leaves it to them.
    `variables` go to the template as they are. `truncate_prompt_tokens` keeps that many of the prompt's last tokens.
    `cache_salt` separates reused prefixes further than the caller's own salt does. `strict_tools` are the names of the
    tools whose arguments must keep their schema also where the model chooses freely whether to call them.
    """

    messages: Sequence[Message]
    sampling: SamplingParams
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = ToolChoice()
    strict_tools: frozenset[str] = frozenset()
    reasoning: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None


def check_tools(turn: ChatTurn) -> None:
    """Raise RequestError for tools without a name of their own, or a choice that names none of them."""
    if len(turn.tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(turn.tools)} entries; at most {MAX_TOOLS} are taken")
    names = [tool_name(tool) for tool in turn.tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"tools has {twice!r} more than once; give each tool a name of its own")
    choice = turn.tool_choice
    if choice.forced and not names:
        raise RequestError(f"tool_choice={choice.mode.value!r} needs tools, and the request has none; add tools")
    if choice.mode is ToolMode.NAMED and choice.name not in names:
        raise RequestError(f"tool_choice names {choice.name!r}, which is none of the tools: {', '.join(names)[:500]}")


def tool_name(tool: Tool) -> str:
    """Return the name of a tool in the form that templates take."""
    name = tool["function"]["name"]
    assert isinstance(name, str), "handlers check the names of tools"
    return name


def template_messages(messages: Sequence[Message], template: str) -> list[Message]:
    """Return messages as a template expects them.

    The arguments of earlier calls become objects; text that is no JSON object stays. What a developer says is the
    system's for a template that knows no developers.
    """
    knows_developers = "developer" in template
    prepared = []
    for message in messages:
        if message.get("role") == "developer" and not knows_developers:
            message = {**message, "role": "system"}
        prepared.append(_parsed_message(message) if message.get("tool_calls") else message)
    return prepared


def _parsed_message(message: Message) -> Message:
    return {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = read_json(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def template_variables(turn: ChatTurn) -> dict[str, Any]:
    """Return the template's variables. A constrained answer has no room for thinking before it."""
    reasoning = turn.reasoning
    if reasoning is None and (turn.tool_choice.forced or turn.sampling.structured is not None):
        reasoning = False
    # Qwen's and GLM's templates read the first name, DeepSeek's and Granite's the second.
    named = {} if reasoning is None else {"enable_thinking": reasoning, "thinking": reasoning}
    return {**named, **turn.variables}
