"""Text to token ids and back, equal to Hugging Face's tokenizers.

A folder with `tokenizer.json` is read by the `tokenizers` library alone, which starts in a fraction of the time;
other formats go through transformers, imported when needed. Not incremental: see `detokenizer`. The engine owns one
tokenizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zif.errors import ConfigError, ModelError
from zif.text.tokenizer_files import TokenizerFiles, TokenText, read_tokenizer_files

if TYPE_CHECKING:
    import tokenizers

OTHER_FORMATS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that say a tokenizer is there which transformers can convert."""

CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""Where `clean_up_tokenization_spaces` removes spaces, in order of removal."""


def clean_up_spaces(text: str) -> str:
    """Remove the spaces that word-level tokenizers leave before punctuation, as transformers does."""
    for pattern in CLEANED:
        text = text.replace(pattern, pattern.strip(" "))
    return text


class Tokenizer(ABC):
    """A vocabulary with its rules. Token ids run from 0 to `max_token_id`, possibly with gaps.

    `special_ids` are those that `skip_special_tokens` leaves out; `cleans_up_spaces` says whether decoding removes
    spaces before punctuation; `special_tokens` gives the text of special tokens by name, such as "eos_token".
    """

    def __init__(self, special_tokens: dict[str, str], special_ids: frozenset[int], cleans_up_spaces: bool) -> None:
        self.special_tokens = special_tokens
        self.special_ids = special_ids
        self.cleans_up_spaces = cleans_up_spaces

    @abstractmethod
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text; with `add_special_tokens` those the model expects around it, such as BOS."""

    @abstractmethod
    def encode_pair(self, first: str, second: str) -> list[int]:
        """Return the token ids of two texts in one sequence, with the special tokens that the model expects."""

    @abstractmethod
    def decode_raw(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids before spaces are cleaned up. Ids without a token give nothing."""

    @abstractmethod
    def token_text(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, None for an id without a token."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, None if it is not a token."""

    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Return all tokens, added ones too, with their ids."""

    def definition(self) -> str | None:
        """Return the tokenizer as the text of a `tokenizer.json`, None for one that has no such form."""
        return None

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text, as `encode` does."""
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids. Ids without a token give nothing."""
        text = self.decode_raw(token_ids, skip_special_tokens)
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def token_ids(self, tokens: Sequence[str]) -> list[int | None]:
        """Return the ids of tokens as the vocabulary spells them."""
        return [self.token_id(token) for token in tokens]

    def named_id(self, name: str) -> int | None:
        """Return the id of a special token by its name, such as "pad_token"; None where the model has none."""
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a sequence."""
        return self.named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a sequence. A model's generation config may name more."""
        return self.named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id that fills up batches."""
        return self.named_id("pad_token")

    @cached_property
    def vocab_size(self) -> int:
        """The number of tokens, added ones too. The model's logits may be wider."""
        return len(self.vocab())

    @cached_property
    def max_token_id(self) -> int:
        """The highest id of a token."""
        return max(self.vocab().values())


class FastTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library. Takes `backend` over and adds the tokens that `files` list."""

    def __init__(self, backend: "tokenizers.Tokenizer", files: TokenizerFiles) -> None:
        self._backend = backend
        # A file may hold the truncation and padding of its training run.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(files.config.get("split_special_tokens", False))
        _add_tokens(backend, files)
        named = {name: token.content for name, token in files.named.items()}
        super().__init__(named, _special_ids(backend, files), _cleans_up_spaces(backend, files))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_pair(self, first: str, second: str) -> list[int]:
        return list(self._backend.encode(first, second).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode_raw(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str | None:
        text: str | None = self._backend.id_to_token(token_id)
        return text

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def vocab(self) -> dict[str, int]:
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def definition(self) -> str | None:
        return str(self._backend.to_str())


class TransformersTokenizer(Tokenizer):
    """A tokenizer that only transformers can run, such as one written in Python. `inner` is transformers' own."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._ids = dict(inner.get_vocab())
        self._tokens = {token_id: token for token, token_id in self._ids.items()}
        cleans_up_spaces = bool(inner.clean_up_tokenization_spaces)
        super().__init__(dict(inner.special_tokens_map), frozenset(inner.all_special_ids), cleans_up_spaces)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._inner(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_pair(self, first: str, second: str) -> list[int]:
        return list(self._inner(first, second)["input_ids"])

    def decode_raw(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [token_id for token_id in token_ids if token_id in self._tokens]
        text = self._inner.decode(known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def token_text(self, token_id: int) -> str | None:
        return self._tokens.get(token_id)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def vocab(self) -> dict[str, int]:
        return dict(self._ids)


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of the model folder `path`.

    `trust_remote_code` lets transformers run Python code of the folder; without it such a tokenizer is refused.
    Raises ModelError when there is no tokenizer or it cannot be read, ConfigError when transformers is missing.
    """
    files = read_tokenizer_files(path)
    if (path / "tokenizer.json").is_file():
        return _load_fast(path, files)
    if not any((path / name).is_file() for name in OTHER_FORMATS) and "auto_map" not in files.config:
        raise ModelError(
            f"no tokenizer in {str(path)!r}: none of tokenizer.json, {', '.join(OTHER_FORMATS)};"
            " copy the tokenizer's files there, or give token ids as prompts"
        )
    return _load_with_transformers(path, files, trust_remote_code)


def _load_fast(path: Path, files: TokenizerFiles) -> FastTokenizer:
    import tokenizers

    file = path / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise ModelError(
            f"tokenizer.json of {str(path)!r} cannot be read: {error}; download it again, or upgrade tokenizers"
            f" (installed: {tokenizers.__version__})"
        ) from error
    return FastTokenizer(backend, files)


def _load_with_transformers(path: Path, files: TokenizerFiles, trust_remote_code: bool) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"the tokenizer of {str(path)!r} has no tokenizer.json and needs transformers to be read;"
            " run: pip install 'zif[transformers]'"
        ) from error
    try:
        inner = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the checkpoint decides which code of transformers runs, and so what it raises
        raise ModelError(f"transformers cannot load the tokenizer of {str(path)!r}: {error}") from error
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        return TransformersTokenizer(inner)
    config = files.config | {"clean_up_tokenization_spaces": inner.clean_up_tokenization_spaces}
    named = {name: TokenText(str(token)) for name, token in inner.special_tokens_map.items()}
    return FastTokenizer(backend, replace(files, config=config, named=named))


def _add_tokens(backend: "tokenizers.Tokenizer", files: TokenizerFiles) -> None:
    """Add the listed tokens in the order of their ids, then mark the special ones.

    The matching rules of a token are those of the list in tokenizer_config.json; without one, those of tokenizer.json.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if "added_tokens_decoder" in files.config:
        known = {}
    known |= {token.content: _added(token) for _, token in sorted(files.added.items()) if token.content not in known}
    backend.add_tokens([known[token.content] for _, token in sorted(files.added.items())])
    special = (*files.named.values(), *files.extra)
    backend.add_special_tokens([known.get(token.content) or _added(token) for token in special])


def _special_ids(backend: "tokenizers.Tokenizer", files: TokenizerFiles) -> frozenset[int]:
    added = backend.get_added_tokens_decoder()
    named = {token.content for token in (*files.named.values(), *files.extra)}
    return frozenset(i for i, token in added.items() if token.special or token.content in named)


def _cleans_up_spaces(backend: "tokenizers.Tokenizer", files: TokenizerFiles) -> bool:
    if not files.config.get("clean_up_tokenization_spaces", False):
        return False
    # transformers 5 ignores the setting for BPE, whose spaces are real ones.
    forced = files.config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(forced) or type(backend.model).__name__ != "BPE"


def _added(token: TokenText) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=token.special,
    )
