"""What every answer says of itself: token counts, when it was made, by what."""

import secrets
import string
import time

import msgspec

import zif
from zif.serving.answers import ModelInfo

_CALL_ID_ALPHABET = string.ascii_letters + string.digits
_CALL_ID_CHARACTERS = 9
"""Mistral's templates refuse ids of another length; 9 letters and digits are 53 random bits."""


class PromptDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those that were found computed."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct, frozen=True):
    """Of the answer's tokens, those that were reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request, over all its samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


def usage_of(num_prompt_tokens: int, num_completion_tokens: int, num_cached: int, num_reasoning: int = 0) -> Usage:
    """Return the counts as the API writes them."""
    total = num_prompt_tokens + num_completion_tokens
    details = PromptDetails(num_cached), CompletionDetails(num_reasoning)
    return Usage(num_prompt_tokens, num_completion_tokens, total, *details)


class Origin(msgspec.Struct, frozen=True):
    """The fields that all chunks of an answer repeat. `created` is in seconds since 1970."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def origin_of(kind: str, request_id: str, model: str, info: ModelInfo) -> Origin:
    """Return the origin of the answer to the request `request_id`; `kind` is the prefix of its id, such as "cmpl"."""
    fingerprint = f"zif-{zif.__version__}-{info.platform}"
    return Origin(f"{kind}-{request_id}", int(time.time()), model, fingerprint)


def new_call_id() -> str:
    """Return the id of a tool call."""
    return "".join(secrets.choice(_CALL_ID_ALPHABET) for _ in range(_CALL_ID_CHARACTERS))
