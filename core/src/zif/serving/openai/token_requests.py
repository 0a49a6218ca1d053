"""Requests about tokens: /tokenize, /detokenize, and what the render routes answer."""

from dataclasses import fields
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from zif.contract import SamplingParams
from zif.serving.chat.turn import MAX_MESSAGES, MAX_TOOLS
from zif.serving.openai.fields import ChatMessage, ChatTool, Name, TokenId
from zif.serving.prompts import MAX_DECODED_TOKENS


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A prompt, or the messages of a chat. `return_token_strs` adds each token as the vocabulary spells it."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[ChatTool], Meta(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    return_token_strs: bool | None = None
    chat_template: Any = None


class TokenizeAnswer(msgspec.Struct):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Token ids. Special tokens are part of the text unless `skip_special_tokens`."""

    tokens: Annotated[list[TokenId], Meta(max_length=MAX_DECODED_TOKENS)]
    model: Name | None = None
    skip_special_tokens: bool | None = None


class DetokenizeAnswer(msgspec.Struct):
    """The text of the tokens."""

    prompt: str


class RenderedPrompt(msgspec.Struct, kw_only=True):
    """What a request asks of the engine: the prompt as the model sees it, and the sampling options that are set.

    `features` is where other servers put images; `prompt` is None where the request gave tokens.
    """

    request_id: str
    model: str
    token_ids: list[int]
    sampling_params: dict[str, Any]
    max_model_len: int
    prompt: str | None
    features: None = None


def sampling_json(sampling: SamplingParams) -> dict[str, Any]:
    """Return sampling options as JSON has them, those that are not set left out."""
    values = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    return {name: value for name, value in values.items() if value is not None}
