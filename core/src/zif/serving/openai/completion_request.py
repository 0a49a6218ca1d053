"""A request to /v1/completions: prompts as text or token ids, and the sampling options of each."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from zif.contract import SamplingParams
from zif.serving.openai.fields import (
    NO_EFFECT,
    REFUSED,
    AnswerForm,
    GenerationFields,
    NumLogprobs,
    Refusal,
    TokenId,
    check_stream_options,
    invalid,
    refuse,
    sampling_of,
)
from zif.serving.openai.messages import response_form
from zif.serving.prompts import Prompts

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048
MAX_CHOICES = 4096
MAX_PROMPT_TOKENS = 2**20

COMPLETION_REFUSED: Mapping[str, Refusal] = {
    **REFUSED,
    "suffix": Refusal("text cannot be inserted before other text", ("",)),
    "prompt_embeds": Refusal("prompts are text or token ids"),
}
"""Fields of `CompletionRequest` that do not work here."""

COMPLETION_NO_EFFECT = NO_EFFECT

PromptIds = Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(GenerationFields, kw_only=True):
    """The body of a completion. `prompt`: a text, texts, token ids, or lists of token ids."""

    prompt: str | Annotated[list[str | TokenId | PromptIds], Meta(min_length=1, max_length=MAX_PROMPT_TOKENS)]
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    response_format: dict[str, Any] | None = None

    suffix: Any = None
    prompt_embeds: Any = None


@dataclass(frozen=True, slots=True)
class TextOrTokens:
    """One prompt. `text` is None for one that came as token ids, or that was cut."""

    text: str | None
    token_ids: list[int]


def check_completion(body: CompletionRequest) -> None:
    """Raise ApiError for fields that do not work, or do not go together."""
    refuse(body, COMPLETION_REFUSED)
    check_stream_options(body)
    num_samples = body.n or 1
    if body.best_of is not None and body.best_of != num_samples:
        raise invalid(
            f"'best_of' is {body.best_of} and n is {num_samples}: samples are not ranked here; leave best_of out, or"
            " choose among n samples by their logprobs",
            "best_of",
            "unsupported_parameter",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("'prompt_logprobs' is not streamed; use echo with logprobs, or no stream", "prompt_logprobs")


def is_text(prompt: object) -> bool:
    """Say whether a prompt, or one of several, is text."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and any(isinstance(entry, str) for entry in prompt))


async def prompts_of(body: CompletionRequest, prompts: Prompts | None) -> list[TextOrTokens]:
    """Return the prompts as tokens. `prompts` may be None for those that are tokens already.

    Raises ApiError or RequestError for what is no prompt.
    """
    given = body.prompt
    entries: list[Any] = [given] if isinstance(given, str) or _is_ids(given) else list(given)
    kinds = {type(entry) for entry in entries}
    if len(kinds) > 1 or (int in kinds and len(entries) > 1):
        raise invalid("'prompt' mixes texts and tokens; give texts, token ids, or lists of token ids", "prompt")
    num_choices = len(entries) * (body.n or 1)
    if len(entries) > MAX_PROMPTS or num_choices > MAX_CHOICES:
        raise invalid(
            f"'prompt' has {len(entries)} prompts with {num_choices} answers; at most {MAX_PROMPTS} and {MAX_CHOICES}"
            " are taken at once",
            "prompt",
        )
    found = []
    for entry in entries:
        found.append(await _tokens(entry, body, prompts))
        # Short texts are encoded on the event loop: between two of them others get their turn.
        await asyncio.sleep(0)
    return found


def _is_ids(given: object) -> bool:
    return isinstance(given, list) and all(type(entry) is int for entry in given)


async def _tokens(entry: str | list[int], body: CompletionRequest, prompts: Prompts | None) -> TextOrTokens:
    text = entry if isinstance(entry, str) else None
    if isinstance(entry, str):
        assert prompts is not None, "text needs a tokenizer, which was looked for"
        token_ids = await prompts.encode(entry, add_special_tokens=body.add_special_tokens is not False)
    else:
        token_ids = entry
    limit = body.truncate_prompt_tokens
    if limit is not None and len(token_ids) > limit:
        return TextOrTokens(None, token_ids[-limit:])
    return TextOrTokens(text, token_ids)


def completion_sampling(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    """Return what the engine is asked for. `max_tokens` 0 becomes 1, whose token is then not shown."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    structured = response_form(body.response_format)
    if body.structured_outputs is not None:
        if structured is not None:
            raise invalid(
                "'response_format' and 'structured_outputs' exclude each other; give one", "structured_outputs"
            )
        structured = body.structured_outputs.structured()
    form = AnswerForm(max(1, max_tokens), body.logprobs, prompt_logprobs, structured)
    return sampling_of(body, defaults, form)
