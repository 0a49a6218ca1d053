"""The small JSON files beside a tokenizer, read the way Hugging Face reads them.

Which special tokens there are is spread over `tokenizer_config.json`, `special_tokens_map.json` and, in old
checkpoints, `added_tokens.json`. Not the vocabulary itself. The tokenizer and the chat templates read it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zif.errors import ModelError

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token that the files add to the vocabulary, with the matching rules of the `tokenizers` library."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files say besides the vocabulary.

    `config` is `tokenizer_config.json` (empty without the file). `named` are the special tokens by name, such as
    "eos_token"; `extra` the special tokens without a name; `added` the tokens listed with their ids.
    """

    config: dict[str, Any] = field(default_factory=dict)
    named: dict[str, TokenText] = field(default_factory=dict)
    extra: tuple[TokenText, ...] = ()
    added: dict[int, TokenText] = field(default_factory=dict)


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read the files of the model folder `path`. Raises ModelError for a file that is not what it should be."""
    config = read_json_object(path / "tokenizer_config.json")
    listed = config.get("added_tokens_decoder")
    merged = dict(config)
    if listed is None:
        # Older checkpoints keep the special tokens in a file of their own, which then decides.
        merged |= read_json_object(path / "special_tokens_map.json")
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    named = {name: value for name, value in merged.items() if name in STANDARD_NAMES or name.endswith("_token")}
    if isinstance(extra, Mapping):
        named |= extra
        extra = []
    tokens = {name: token for name, value in named.items() if (token := _special_token(value)) is not None}
    unnamed = tuple(token for value in extra if (token := _special_token(value)) is not None)
    if listed is not None:
        return TokenizerFiles(config, tokens, unnamed, {int(key): _listed(value) for key, value in listed.items()})
    special = {token.content for token in (*tokens.values(), *unnamed)}
    added = {
        int(index): TokenText(content, normalized=content not in special, special=content in special)
        for content, index in read_json_object(path / "added_tokens.json").items()
    }
    return TokenizerFiles(config, tokens, unnamed, added)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, empty when there is no file. Raises ModelError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} of {str(path.parent)!r} cannot be read: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of {str(path.parent)!r} holds a {type(value).__name__}, not an object")
    return value


def _special_token(value: object) -> TokenText | None:
    if isinstance(value, str):
        return TokenText(value)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return _token(value, special=True, normalized=bool(value.get("normalized", False)))
    return None


def _listed(value: object) -> TokenText:
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise ModelError(f"added_tokens_decoder of tokenizer_config.json holds {value!r}, not a token with content")
    special = bool(value.get("special", False))
    return _token(value, special=special, normalized=bool(value.get("normalized", not special)))


def _token(value: Mapping[str, Any], *, special: bool, normalized: bool) -> TokenText:
    flags = {name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return TokenText(value["content"], **flags, normalized=normalized, special=special)
