"""How the next token of a request is chosen, as values.

Names follow vLLM's `SamplingParams` where the meaning is the same.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from zif.contract.structured import StructuredOutput
from zif.errors import RequestError

MAX_SAMPLES = 4096
MAX_LOGPROBS = 1024
GREEDY_TEMPERATURE = 1e-5
"""At or below this temperature the most likely token is taken: division by it would overflow float32 logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request. Values out of range raise `RequestError` that names option and limit.

    `top_k` 0 or -1 means all tokens. `max_tokens` None means up to the model's length. `seed` None draws from the
    engine's seed; with a seed the same request gives the same tokens at any batch size. `logprobs` k reports the k
    most likely tokens beside the sampled one, `prompt_logprobs` does so for the prompt. `structured` is the form that
    the whole output must have; it ends by itself, so `ignore_eos` is refused beside it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, MAX_SAMPLES, integer=True)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("top_k", self.top_k, -1, 2**31 - 1, integer=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1, integer=True)
        _check_optional("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_optional("seed", self.seed, -(2**63), 2**63 - 1)
        _check_optional("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_optional("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_kinds()
        self._check_lists()

    def _check_lists(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower min_tokens")
        if any(not isinstance(s, str) or not s for s in self.stop_strings):
            raise RequestError(f"stop={self.stop!r}: every stop string must be a non-empty string")
        if self.stop_strings and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize=True or use stop_token_ids")
        if any(not isinstance(w, str) or not w.strip() for w in self.bad_words or ()):
            raise RequestError(f"bad_words={self.bad_words!r}: every word must be a non-empty string")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be sampled; leave it out to allow all")
        for token_id, bias in (self.logit_bias or {}).items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                _check_range(name, token_id, 0, 2**31 - 1, integer=True)

    def _check_kinds(self) -> None:
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} must be True or False")
        for name in ("allowed_token_ids", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, str | bytes) or not isinstance(value, Collection)):
                raise RequestError(f"{name}={value!r} must be a list")
        if self.stop is not None and not isinstance(self.stop, Collection):
            raise RequestError(f"stop={self.stop!r} must be a string or a list of strings")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise RequestError(f"structured={self.structured!r} must be a StructuredOutput")
        if self.structured is not None and self.ignore_eos:
            raise RequestError("ignore_eos=True has no meaning beside structured, whose form says where to end")

    @property
    def greedy(self) -> bool:
        """Say whether the most likely token is always taken."""
        return self.temperature <= GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def for_sample(self, index: int) -> "SamplingParams":
        """Return the options of sample `index` of n.

        Each has its own seed when one was given; the first keeps it, so that it equals a request with n = 1. Only the
        first reports on the prompt that all share.
        """
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed, prompt_logprobs=None if index else self.prompt_logprobs)


def _check_range(
    name: str, value: float, low: float, high: float, *, integer: bool = False, open_low: bool = False
) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise RequestError(f"{name}={value!r} must be {'an integer' if integer else 'a number'}")
    below = value <= low if open_low else value < low
    if not math.isfinite(value) or below or value > high:
        raise RequestError(f"{name}={value!r} is out of range: {'(' if open_low else '['}{low}, {high}]")


def _check_optional(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        _check_range(name, value, low, high, integer=True)
