"""Requests of the Responses API as they are decoded, with a bound on every number, list and string.

Items, tools and choices have types that this server does not serve, so they are decoded one by one, by type, which
names the type that was refused. Nested objects refuse keys that they do not have. Fields declared `Any` are in
`REFUSED`. Source: the types of OpenAI's Python client, and the Open Responses specification.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from zif.serving.chat.conversation import TOOL_NAME
from zif.serving.chat.turn import MAX_MESSAGES, MAX_TOOLS
from zif.serving.openai.fields import MAX_INT, Identity, Metadata, Name, Penalty, Refusal, StreamOptions

MAX_TEXT = 2**24
MAX_PARTS = 4096
MAX_ITEMS = 4 * MAX_MESSAGES
"""A message may come as several items: reasoning, text, calls."""

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Nothing = Annotated[list[Any], Meta(max_length=0)] | None
Direct = dict[Literal["type"], Literal["direct"]] | None


class InputText(msgspec.Struct, tag_field="type", tag="input_text", forbid_unknown_fields=True):
    """What a user, the system or a tool said."""

    text: Text
    prompt_cache_breakpoint: dict[str, Any] | None = None


class OutputText(msgspec.Struct, tag_field="type", tag="output_text", forbid_unknown_fields=True):
    """What the model said in an earlier turn."""

    text: Text
    annotations: Nothing = None
    logprobs: list[Any] | None = None


class Refused(msgspec.Struct, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    """What a model said when it refused, in an earlier turn."""

    refusal: Text


class InputImage(msgspec.Struct, tag_field="type", tag="input_image"):
    """Refused."""


class InputFile(msgspec.Struct, tag_field="type", tag="input_file"):
    """Refused."""


class InputAudio(msgspec.Struct, tag_field="type", tag="input_audio"):
    """Refused."""


Part = InputText | OutputText | Refused | InputImage | InputFile | InputAudio
Parts = Annotated[list[Part], Meta(max_length=MAX_PARTS)]


class MessageItem(msgspec.Struct, forbid_unknown_fields=True):
    """What somebody said."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts
    type: str = "message"
    id: Name | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(msgspec.Struct, forbid_unknown_fields=True):
    """A call that the model made."""

    call_id: CallId
    name: Name
    arguments: Text
    type: str = "function_call"
    id: Name | None = None
    status: Status | None = None
    caller: Direct = None
    namespace: None = None
    async_: bool | None = msgspec.field(default=None, name="async")


class FunctionCallOutputItem(msgspec.Struct, forbid_unknown_fields=True):
    """What a tool answered."""

    call_id: CallId
    output: Text | Parts
    type: str = "function_call_output"
    id: Name | None = None
    status: Status | None = None
    name: Name | None = None
    caller: Direct = None
    namespace: None = None


class ReasoningText(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of reasoning or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(msgspec.Struct, forbid_unknown_fields=True):
    """What the model thought in an earlier turn, in clear: what was encrypted elsewhere cannot be read here."""

    summary: Annotated[list[ReasoningText], Meta(max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ReasoningText], Meta(max_length=MAX_PARTS)] | None = None
    type: str = "reasoning"
    id: Name | None = None
    status: Status | None = None
    encrypted_content: Text | None = None


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True):
    """A tool that the client runs."""

    type: Literal["function"]
    name: Annotated[str, Meta(pattern=TOOL_NAME)]
    parameters: dict[str, Any] | None = None
    description: Annotated[str, Meta(max_length=2**16)] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None
    async_: bool | None = msgspec.field(default=None, name="async")


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The function that must be called, or one of those that may be."""

    type: Literal["function"]
    name: Name


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """Which of the tools may be called in this turn."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Meta(min_length=1, max_length=MAX_TOOLS)]


class PlainFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON of a schema; with or without `strict` the answer follows it."""

    name: Name
    schema: dict[str, Any]
    description: Annotated[str, Meta(max_length=2**16)] | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    """How the answer's text is written."""

    format: PlainFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """How much to think first. "none" asks the template not to."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class CountInputTokens(msgspec.Struct, kw_only=True):
    """What the prompt is made of; by itself a question for its length."""

    input: Text | Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_ITEMS)]
    model: Name | None = None
    instructions: Text | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    conversation: Any = None
    personality: Any = None
    previous_response_id: Any = None
    truncation: Any = None


class CreateResponse(CountInputTokens, kw_only=True):
    """A question for the next items. None takes the model's own default."""

    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    include: Annotated[list[Includable], Meta(max_length=16)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None

    max_tool_calls: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    user: Identity | None = None
    safety_identifier: Identity | None = None
    prompt_cache_key: Identity | None = None
    prompt_cache_retention: Literal["in_memory", "24h", "in-memory"] | None = None
    service_tier: Name | None = None

    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    image: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    store: Any = None
    top_logprobs: Any = None


NO_EFFECT: Mapping[str, str] = {
    "input.id": "no item is kept to be found again",
    "input.status": "what was cut off is sent as it is",
    "input.phase": "chat templates have no place for it",
    "input.annotations": "the text has what it says",
    "input.logprobs": "they say nothing to a model",
    "input.prompt_cache_breakpoint": "computed prefixes are found again without marks",
    "reasoning.effort": "it is for chat templates that take an effort; others have none",
    "reasoning.summary": "reasoning is given whole",
    "reasoning.generate_summary": "reasoning is given whole",
    "text.format.name": "the schema alone says what the answer is",
    "text.format.description": "the schema alone says what the answer is",
    "text.format.strict": "the answer follows the schema with or without it",
}
"""Fields that are accepted and change nothing."""

NO_EFFECT_CREATE: Mapping[str, str] = {
    **NO_EFFECT,
    "max_tool_calls": "it counts calls of built-in tools, which there are none of",
    "user": "callers are told apart by their keys",
    "safety_identifier": "callers are told apart by their keys",
    "prompt_cache_key": "computed prefixes are found again without keys",
    "prompt_cache_retention": "computed prefixes are kept while there is room",
    "service_tier": "there is one tier; answers say 'default'",
    "include": "reasoning is given in clear, and the other items that can be included do not occur;"
    " 'message.output_text.logprobs' is refused",
}

REFUSED: Mapping[str, Refusal] = {
    "conversation": Refusal("no conversation is kept; send all items in 'input'"),
    "personality": Refusal("the model has no such control; ask for it in 'instructions'"),
    "previous_response_id": Refusal("no response is kept; send all items in 'input'"),
    "truncation": Refusal("chats are not shortened here; send fewer items", ("disabled",)),
}
"""Fields that are answered 400."""

REFUSED_CREATE: Mapping[str, Refusal] = {
    **REFUSED,
    "access_programs": Refusal("there are none"),
    "background": Refusal("no response is kept to be asked for later", (False,)),
    "background_options": Refusal("no response is kept to be asked for later"),
    "context_management": Refusal("chats are not shortened here; send fewer items"),
    "image": Refusal("the model reads text only"),
    "moderation": Refusal("nothing is moderated here"),
    "prompt": Refusal("no prompts are kept; send 'instructions' and 'input'"),
    "prompt_cache_options": Refusal("computed prefixes are found again without options"),
    "store": Refusal("no response is kept", (False,)),
    "top_logprobs": Refusal("log-probabilities are served at /v1/chat/completions", (0,)),
}
