"""The answers of /v1/completions as structs, whole and in chunks, which differ in nothing but their number."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from zif.serving.openai.logprobs import CompletionLogprobs, PromptLogprobs
from zif.serving.openai.usage import Usage


class CompletionChoice(msgspec.Struct):
    """One sample of one prompt, or more of it. `index` counts the samples of all prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """The answer to a request, or a chunk of it. `usage` is None in chunks before the last, if it was asked for."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET
