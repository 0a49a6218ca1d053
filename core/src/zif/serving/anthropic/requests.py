"""Requests of the Messages API as they are decoded, with a bound on every number, list and string.

Nested objects refuse keys that they do not have; of the request itself the server tells which were unknown. Fields
that are declared `Any` here are in `REFUSED` or `NO_EFFECT`, each with its reason. Source: the API reference at
docs.anthropic.com, and the types of its Python client.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from zif.serving.chat.conversation import TOOL_NAME
from zif.serving.chat.turn import MAX_MESSAGES, MAX_TOOLS
from zif.serving.openai.fields import Refusal

MAX_TEXT = 2**24
MAX_BLOCKS = 4096

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Nothing = Annotated[list[Any], Meta(max_length=0)] | None
"""A key that answers of the API have and send back empty."""


class TextBlock(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """A piece of text."""

    text: Text
    cache_control: dict[str, Any] | None = None
    citations: Nothing = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking", forbid_unknown_fields=True):
    """What the model thought in an earlier turn. The signature is not looked at: the caller may edit its own chat."""

    thinking: Text
    signature: Annotated[str, Meta(max_length=2**20)] = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use", forbid_unknown_fields=True):
    """A call that the model made in an earlier turn."""

    id: Name
    name: Name
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: dict[Literal["type"], Literal["direct"]] | None = None
    toolset_name: None = None


class ImageBlock(msgspec.Struct, tag_field="type", tag="image"):
    """Refused."""


class DocumentBlock(msgspec.Struct, tag_field="type", tag="document"):
    """Refused."""


class SearchResultBlock(msgspec.Struct, tag_field="type", tag="search_result"):
    """Refused."""


class ToolReferenceBlock(msgspec.Struct, tag_field="type", tag="tool_reference"):
    """Refused."""


class RedactedThinkingBlock(msgspec.Struct, tag_field="type", tag="redacted_thinking"):
    """Refused: only the service that wrote it can read it."""


class ServerToolUseBlock(msgspec.Struct, tag_field="type", tag="server_tool_use"):
    """Refused."""


class ContainerUploadBlock(msgspec.Struct, tag_field="type", tag="container_upload"):
    """Refused."""


RefusedBlock = (
    ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ToolReferenceBlock
    | RedactedThinkingBlock
    | ServerToolUseBlock
    | ContainerUploadBlock
)


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result", forbid_unknown_fields=True):
    """What a tool answered."""

    tool_use_id: Name
    content: Text | Annotated[list[TextBlock | RefusedBlock], Meta(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    toolset_name: None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock | RefusedBlock


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Meta(max_length=MAX_BLOCKS)]


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool that the client runs."""

    name: Annotated[str, Meta(pattern=TOOL_NAME)]
    input_schema: dict[str, Any]
    description: Annotated[str, Meta(max_length=2**16)] | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Whether and what to call. `name` comes with "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    """Whether to think first, and whether the thoughts are shown."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON schema that the answer's text has to have."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How the answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    """Who asks, in the words of the client."""

    user_id: Annotated[str, Meta(max_length=1024)] | None = None


class CountTokens(msgspec.Struct, kw_only=True):
    """What the prompt is made of; by itself a question for its length."""

    model: Name
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Text | Annotated[list[TextBlock], Meta(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    speed: Any = None
    mcp_servers: Any = None
    compaction: Any = None
    billing_policy: Any = None


class CreateMessage(CountTokens, kw_only=True):
    """A question for the next message."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    stop_sequences: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(max_length=16)] | None = (
        None
    )
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    fallbacks: Any = None
    fallback_credit_token: Any = None
    thread: Any = None


NO_EFFECT = {
    "cache_control": "computed prefixes are found again without marks",
    "messages.cache_control": "computed prefixes are found again without marks, in blocks, tools and system too",
    "context_management": "nothing is cleared from the context",
    "messages.signature": "what is sent back as thought is taken as it is",
    "output_config.effort": "it is for chat templates that take an effort; others have none",
    "thinking.display.summarized": "thoughts are shown whole, or omitted",
    "thinking.budget_tokens": "thinking is bounded by max_tokens alone",
    "tools.eager_input_streaming": "inputs are always streamed as they are written",
}
NO_EFFECT_CREATE = {
    **NO_EFFECT,
    "metadata": "callers are told apart by their keys",
    "service_tier": "there is one tier",
}

REFUSED: Mapping[str, Refusal] = {
    "mcp_servers": Refusal("the server calls no other servers; give the tools in 'tools'"),
    "compaction": Refusal("chats are not shortened here; send fewer messages"),
    "billing_policy": Refusal("nothing is billed"),
    "speed": Refusal("there is one speed", ("standard",)),
}
REFUSED_CREATE: Mapping[str, Refusal] = {
    **REFUSED,
    "container": Refusal("there are no containers"),
    "diagnostics": Refusal("no message is kept to compare with"),
    "inference_geo": Refusal("the server does not know where it is"),
    "fallbacks": Refusal("one model is served"),
    "fallback_credit_token": Refusal("one model is served"),
    "thread": Refusal("no message is kept; send the whole chat in 'messages'"),
}

REFUSED_BLOCKS = {
    "redacted_thinking": "only the service that wrote it can read it; leave the block out",
    "server_tool_use": "no tools run on this server; leave the block out",
    "container_upload": "there are no containers; leave the block out",
    "document": "send its text as a text block",
    "search_result": "send its text as a text block",
    "image": "the model reads text only",
    "tool_reference": "all tools are given with the request; answer with text",
}
