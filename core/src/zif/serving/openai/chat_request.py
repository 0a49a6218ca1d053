"""A request to /v1/chat/completions, and the neutral `ChatTurn` that it becomes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from zif.contract import SamplingParams, StructuredOutput
from zif.serving.chat.turn import MAX_MESSAGES, MAX_TOOLS, ChatTurn
from zif.serving.openai.fields import (
    NO_EFFECT,
    REFUSED,
    AnswerForm,
    ChatMessage,
    ChatTool,
    GenerationFields,
    Identity,
    Metadata,
    NumLogprobs,
    PositiveCount,
    Refusal,
    check_stream_options,
    invalid,
    refuse,
    sampling_of,
)
from zif.serving.openai.messages import checked_messages, checked_tools, chosen_tools, response_form, strict_names

_FUNCTIONS = Refusal("functions are superseded; use tools and tool_choice")

CHAT_REFUSED: Mapping[str, Refusal] = {
    **REFUSED,
    "audio": Refusal("answers are text"),
    "modalities": Refusal("answers are text", (["text"],)),
    "functions": _FUNCTIONS,
    "function_call": _FUNCTIONS,
    "moderation": Refusal("nothing is moderated here"),
    "prediction": Refusal("no predicted text is taken"),
    "store": Refusal("nothing is stored", (False,)),
    "verbosity": Refusal("the model has no such control; ask for it in a message", ("medium",)),
    "web_search_options": Refusal("this server makes no request of its own"),
    "chat_template": Refusal("templates come with the model, not with requests"),
    "echo": Refusal("chats repeat no message; use continue_final_message, or /v1/completions", (False,)),
}
"""Fields of `ChatRequest` that do not work here."""

CHAT_NO_EFFECT: Mapping[str, str] = {
    **NO_EFFECT,
    "metadata": "nothing is stored that it could be attached to",
    "prompt_cache_key": "computed prefixes are found by their tokens; cache_salt keeps them apart",
    "prompt_cache_options": "every prefix is kept for reuse as long as there is room",
    "prompt_cache_retention": "every prefix is kept for reuse as long as there is room",
    "safety_identifier": "callers are told apart by their keys",
    "service_tier": "there is one tier; use priority",
    "messages.content.prompt_cache_breakpoint": "prefixes are kept block by block, wherever they end",
    "messages.content.cache_control": "prefixes are kept block by block, wherever they end",
    "response_format.json_schema.strict": "the schema is always kept",
    "response_format.json_schema.name": "the schema alone says what the answer is",
    "response_format.json_schema.description": "the schema alone says what the answer is",
}
"""Fields of `ChatRequest` that are accepted and change nothing."""

EFFORTS = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class CacheOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the caller wants prefixes to be kept."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Annotated[str, Meta(max_length=16)] | None = None


class ChatRequest(GenerationFields, kw_only=True):
    """The body of a chat completion."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[ChatTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: EFFORTS | None = None

    metadata: Metadata | None = None
    prompt_cache_key: Identity | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Annotated[str, Meta(max_length=16)] | None = None
    safety_identifier: Identity | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    include_reasoning: bool | None = None

    audio: Any = None
    modalities: Any = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
    prediction: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    chat_template: Any = None
    echo: Any = None


def turn_of(body: ChatRequest, defaults: SamplingParams) -> ChatTurn:
    """Return what a request asks for. Raises ApiError that names the field at fault, or RequestError."""
    refuse(body, CHAT_REFUSED)
    check_stream_options(body)
    if body.add_special_tokens:
        raise invalid(
            "'add_special_tokens' is not supported: the template writes them; leave it out", "add_special_tokens"
        )
    if body.top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs logprobs=true; set it", "top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("'prompt_logprobs' is not streamed; leave it or stream out", "prompt_logprobs")
    tools, choice = chosen_tools(
        checked_tools(body.tools or ()), body.tool_choice, body.parallel_tool_calls is not False
    )
    form = AnswerForm(
        max_tokens=_max_tokens(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        structured=_structured(body),
    )
    continued = bool(body.continue_final_message)
    return ChatTurn(
        messages=checked_messages(body.messages),
        sampling=sampling_of(body, defaults, form),
        tools=tools,
        tool_choice=choice,
        strict_tools=strict_names(body.tools or ()),
        reasoning=_reasoning(body),
        variables=_variables(body),
        add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continued,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )


def _max_tokens(body: ChatRequest) -> int | None:
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid(
            f"'max_tokens' is {body.max_tokens} and 'max_completion_tokens' is {body.max_completion_tokens}; they mean"
            " the same: give one",
            "max_tokens",
        )
    if limit == 0:
        raise invalid("'max_tokens' is 0; an answer has at least one token", "max_tokens")
    return limit


def _structured(body: ChatRequest) -> StructuredOutput | None:
    form = response_form(body.response_format)
    if body.structured_outputs is None:
        return form
    if form is not None:
        raise invalid("'response_format' and 'structured_outputs' exclude each other; give one", "structured_outputs")
    return body.structured_outputs.structured()


def _reasoning(body: ChatRequest) -> bool | None:
    return None if body.reasoning_effort is None else body.reasoning_effort != "none"


def _variables(body: ChatRequest) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    if body.documents is not None:
        variables["documents"] = body.documents
    if body.reasoning_effort not in (None, "none"):
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return variables
