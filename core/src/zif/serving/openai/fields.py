"""Fields that requests share: their bounds, how they become sampling options, and the ones that are refused by name.

Every field of the SDK's request types is declared, so that none is dropped in silence: it works, or it is refused here
with the reason, or it is in the route's `no_effect` table, which `/props` shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from zif.contract import SamplingParams, StructuredOutput
from zif.serving.http.errors import ApiError, FailureKind

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_INT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
PositiveCount = Annotated[int, Meta(ge=1, le=MAX_INT)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_INT)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Name = Annotated[str, Meta(max_length=256)]
Word = Annotated[str, Meta(min_length=1, max_length=1024)]
BadWord = Annotated[str, Meta(max_length=1024, pattern=r"\S")]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Metadata = Annotated[dict[Name, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
Identity = Annotated[str, Meta(max_length=1024)]

_TEXT = {"type": "string", "maxLength": 2**24}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
}
_MESSAGE = {
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1, "maxItems": 1024}]},
    },
    "required": ["role", "content"],
}
_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_.-]{1,64}$", "maxLength": 64},
        "parameters": {"type": "object"},
    },
    "required": ["name"],
}
_TOOL = {
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}

ChatMessage = Annotated[dict[str, Any], Meta(extra_json_schema=_MESSAGE)]
"""A message of a chat. `zif.serving.openai.messages` checks it; what the document says here is the usual form."""

ChatTool = Annotated[dict[str, Any], Meta(extra_json_schema=_TOOL)]
"""A tool of a chat, in the same way."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream holds besides the answer. `continuous_usage_stats` puts the usage so far into every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class StructuredFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of the answer, exactly one of these; the bounds are those of `zif.contract.StructuredOutput`."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def structured(self) -> StructuredOutput:
        """Return the form. Raises RequestError for none, more than one, or one out of bounds."""
        return StructuredOutput(
            json=self.json,
            json_object=bool(self.json_object),
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
        )


class GenerationFields(msgspec.Struct, kw_only=True):
    """What completions and chats have in common. None takes the model's own default."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Word | Annotated[list[Word], Meta(max_length=16)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    max_tokens: Count | None = None
    user: Identity | None = None

    top_k: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None
    min_p: Ratio | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=2**18)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: PositiveCount | None = None
    add_special_tokens: bool | None = None
    structured_outputs: StructuredFields | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=MAX_INT)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    use_beam_search: Any = None
    length_penalty: Any = None
    spaces_between_special_tokens: Any = None
    request_id: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None
    thinking_token_budget: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    logits_processors: Any = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused, and the values of it that change nothing and so pass."""

    reason: str
    neutral: tuple[object, ...] = ()


_GUIDED = Refusal("give the form of the answer as structured_outputs or response_format")

REFUSED: Mapping[str, Refusal] = {
    "use_beam_search": Refusal("beams are not searched; ask for n samples", (False,)),
    "length_penalty": Refusal("it belongs to beam search", (1, 1.0)),
    "spaces_between_special_tokens": Refusal("special tokens are written as the tokenizer writes them", (True,)),
    "request_id": Refusal("ids are made by the server; send your own in the header x-request-id"),
    "kv_transfer_params": Refusal("this server moves no KV cache between engines"),
    "vllm_xargs": Refusal("there are no further arguments than those of the API"),
    "thinking_token_budget": Refusal("reasoning has no budget of its own; use max_tokens"),
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "guided_whitespace_pattern": _GUIDED,
    "logits_processors": Refusal("callers bring no code"),
}
"""Fields of `GenerationFields` that do not work here."""

NO_EFFECT: Mapping[str, str] = {"user": "callers are told apart by their keys"}
"""Fields of `GenerationFields` that are accepted and change nothing."""


def refuse(body: msgspec.Struct, table: Mapping[str, Refusal]) -> None:
    """Raise ApiError for the first field of `table` that the body has with a value that is not neutral."""
    for name, refusal in table.items():
        value = getattr(body, name)
        if value is not None and not any(value == neutral for neutral in refusal.neutral):
            raise invalid(f"{name!r} is not supported: {refusal.reason}; leave it out", name, "unsupported_parameter")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return the error of a request whose field `param` is wrong."""
    return ApiError(FailureKind.INVALID, message, param=param, code=code)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What a request wants to know besides text, and how long it may be. `max_tokens` None: to the model's length."""

    max_tokens: int | None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None


_SAME_NAMES = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def sampling_of(body: GenerationFields, defaults: SamplingParams, form: AnswerForm) -> SamplingParams:
    """Return sampling options: the caller's, the model's where there are none. Raises RequestError."""
    given = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    return replace(
        defaults,
        **given,
        max_tokens=form.max_tokens,
        logprobs=form.logprobs,
        prompt_logprobs=form.prompt_logprobs,
        structured=form.structured,
    )


def check_stream_options(body: GenerationFields) -> StreamOptions:
    """Return the stream options. Raises ApiError for those that do not work."""
    if body.stream_options is None:
        return StreamOptions()
    if not body.stream:
        raise invalid("'stream_options' is only taken with stream=true; leave it out", "stream_options")
    if body.stream_options.include_obfuscation:
        raise invalid(
            "'stream_options.include_obfuscation' is not supported: chunks are not padded; leave it out",
            "stream_options.include_obfuscation",
            "unsupported_parameter",
        )
    return body.stream_options
