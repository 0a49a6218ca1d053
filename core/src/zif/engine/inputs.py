"""From what a caller passes to checked requests: tokens, limits and ids that the engine can trust from here on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zif.contract import CacheKey, EngineConfig, ModelDescription, Request, Retention, SamplingParams
from zif.engine.retention import retention_of
from zif.engine.vocabulary import Vocabulary, check_encodable
from zif.errors import CheckpointError, RequestError

PromptInput = str | Mapping[str, Any]
"""A text, or {"prompt": text} or {"prompt_token_ids": [ids]}, either with an optional "cache_salt", which keeps the
KV of this prompt from being shared with prompts of another salt, "tenant", whose share of the engine it uses,
"timeout_s", after which it ends, finished or not, and "retention", a list of {"priority": 0 to 100} with optional
"start", "end" and "duration_s" that says how long the KV of these tokens should stay cached."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens, with its text where there was one."""

    token_ids: list[int]
    text: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    timeout_s: float | None = None
    retention: tuple[Retention, ...] = ()


class InputProcessor:
    """Check prompts and sampling options against one model, and build requests."""

    def __init__(self, model: ModelDescription, config: EngineConfig, vocabulary: Vocabulary) -> None:
        self._model = model
        self._config = config
        self._vocabulary = vocabulary
        self._eos_ids = eos_token_ids(model, vocabulary)

    def prompt(self, given: PromptInput, *, room: int = 1) -> Prompt:
        """Read a prompt in any accepted form. `room` is how many tokens of an answer the context must hold, too.

        Raises `RequestError` with the reason when it cannot be served.
        """
        if isinstance(given, str):
            return self._checked(Prompt(self._vocabulary.encode(given), given), room)
        if not isinstance(given, Mapping):
            raise RequestError(
                f"a prompt of type {type(given).__name__} is not understood; pass text, {{'prompt': text}} or "
                "{'prompt_token_ids': [ids]}"
            )
        unknown = set(given) - {"prompt", "prompt_token_ids", "cache_salt", "tenant", "timeout_s", "retention"}
        if unknown:
            raise RequestError(f"prompt has keys {sorted(unknown)} that are not supported")
        text = _text("prompt", given.get("prompt"))
        salt = _text("cache_salt", given.get("cache_salt")) or ""
        if "prompt_token_ids" in given:
            token_ids = _token_ids(given["prompt_token_ids"])
        elif text is not None:
            token_ids = self._vocabulary.encode(text)
        else:
            raise RequestError("prompt has neither 'prompt' nor 'prompt_token_ids'")
        tenant, timeout_s = self._tenant(given.get("tenant")) or salt, _timeout_s(given.get("timeout_s"))
        retention = retention_of(given.get("retention"))
        return self._checked(Prompt(token_ids, text, salt, tenant, timeout_s, retention), room)

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Raise `RequestError` when options name tokens that the model does not have, or need a tokenizer it lacks."""
        if not isinstance(sampling, SamplingParams):
            raise RequestError(
                f"sampling options of type {type(sampling).__name__} are not understood; pass SamplingParams"
            )
        if sampling.detokenize or sampling.bad_words:
            self._vocabulary.require_tokenizer()
        named: list[tuple[str, Sequence[int]]] = [
            ("allowed_token_ids", sampling.allowed_token_ids or ()),
            ("logit_bias", tuple(sampling.logit_bias or ())),
            ("stop_token_ids", sampling.stop_token_ids or ()),
        ]
        for name, token_ids in named:
            self._check_ids(name, token_ids)

    def request(self, request_id: int, prompt: Prompt, sampling: SamplingParams, seed: int, priority: int) -> Request:
        """Build the request of one sample."""
        num_prompt_tokens = len(prompt.token_ids)
        max_tokens = sampling.max_tokens or self._config.max_model_len
        stop_ids = frozenset(sampling.stop_token_ids or ()) | (frozenset() if sampling.ignore_eos else self._eos_ids)
        return Request(
            request_id=request_id,
            token_ids=prompt.token_ids.copy(),
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
            max_total_tokens=min(num_prompt_tokens + max_tokens, self._config.max_model_len),
            seed=seed,
            stop_ids=stop_ids,
            bad_words_ids=self._bad_words_ids(sampling.bad_words or ()),
            priority=priority,
            arrival=request_id,
            cache_key=CacheKey(salt=prompt.cache_salt),
            tenant=prompt.tenant,
            retention=prompt.retention,
        )

    def is_eos(self, token_id: int) -> bool:
        """Say whether the token ends a sequence for this model."""
        return token_id in self._eos_ids

    @property
    def uses_tenants(self) -> bool:
        """Say whether it matters who a prompt is charged to."""
        return self._config.scheduling_policy == "fair" or bool(self._config.tenant_cache_percent)

    def _tenant(self, value: object) -> str:
        tenant = _text("tenant", value) or ""
        if tenant and not self.uses_tenants:
            raise RequestError(
                f"tenant={tenant!r} has no meaning under scheduling_policy={self._config.scheduling_policy!r}; "
                "open the engine with scheduling_policy='fair' or with tenant_cache_percent, or leave it out"
            )
        return tenant

    def _checked(self, prompt: Prompt, room: int) -> Prompt:
        num_tokens, limit = len(prompt.token_ids), self._config.max_model_len
        if not num_tokens:
            raise RequestError("the prompt is empty: it has no tokens; pass at least one")
        if num_tokens + room > limit:
            what = "prompt and output together" if room else "nothing is cut off"
            raise RequestError(
                f"the prompt has {num_tokens} tokens and the context is {limit} ({what}); "
                "shorten the prompt or raise max_model_len"
            )
        self._check_ids("prompt_token_ids", prompt.token_ids)
        return prompt

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        if not all(type(token_id) is int for token_id in token_ids):
            wrong = next(token_id for token_id in token_ids if type(token_id) is not int)
            raise RequestError(f"{name} holds {wrong!r}, which is no integer token id")
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self._model.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"{name} holds {wrong}; the model's token ids are 0 to {self._model.vocab_size - 1}")

    def _bad_words_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each word's tokens as they stand at the start of a text and after a space."""
        spellings = (variant for word in words for variant in (word.lstrip(), " " + word.lstrip()))
        tokens = (tuple(self._vocabulary.encode(text, add_special_tokens=False)) for text in spellings)
        # A word with a token that the model does not have can never be generated.
        return tuple(dict.fromkeys(ids for ids in tokens if ids and max(ids) < self._model.vocab_size))


def _text(name: str, value: object) -> str | None:
    """Return a prompt's text or salt, None when it is not given."""
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name}={value!r} must be text, not {type(value).__name__}")
    if value is not None:
        check_encodable(name, value)
    return value


def _timeout_s(value: object) -> float | None:
    """Return a prompt's time limit in seconds, None when it has none."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise RequestError(f"timeout_s={value!r} must be a number of seconds above 0; leave it out for no limit")
    return float(value)


def _token_ids(value: object) -> list[int]:
    """Return a copy of a caller's token ids; what they hold is checked later."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise RequestError(
            f"prompt_token_ids of type {type(value).__name__} is not understood; pass a list of integers"
        )
    return list(value)


def eos_token_ids(model: ModelDescription, vocabulary: Vocabulary) -> frozenset[int]:
    """Collect the ids that end a sequence: of generation_config.json, else of config.json, and the tokenizer's."""
    declared = generation_config(model.path).get("eos_token_id")
    if declared is None:
        declared = model.config.get("eos_token_id")
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(type(token_id) is int for token_id in listed):
        raise CheckpointError(f"eos_token_id={declared!r} of {str(model.path)!r} must be a token id or a list of them")
    ids = set(listed)
    if vocabulary.eos_token_id is not None:
        ids.add(vocabulary.eos_token_id)
    return frozenset(token_id for token_id in ids if 0 <= token_id < model.vocab_size)


def generation_config(folder: Path) -> dict[str, Any]:
    """Read generation_config.json; empty when there is none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}); download it again") from error
    return content if isinstance(content, dict) else {}


def default_sampling(folder: Path) -> SamplingParams:
    """Return the options that the model's authors ship in generation_config.json, ours where they give none."""
    declared = generation_config(folder)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: declared[name] for name in names if declared.get(name) is not None}
    if declared.get("max_new_tokens") is not None:
        options["max_tokens"] = declared["max_new_tokens"]
    return SamplingParams(**options)
