"""The tokenizer as the engine uses it: loaded on first need, and its absence an error only of requests that need it."""

from pathlib import Path
from typing import TYPE_CHECKING

from zif.errors import ModelError, RequestError

if TYPE_CHECKING:
    from zif.text.tokenizer import Tokenizer


class Vocabulary:
    """A model's tokenizer, or the reason why there is none."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from zif.text.tokenizer import load_tokenizer

        self._tokenizer: Tokenizer | None = None
        self._absence = ""
        try:
            self._tokenizer = load_tokenizer(folder, trust_remote_code)
        except ModelError as error:
            self._absence = str(error)

    @property
    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer; raise `RequestError` with the reason when there is none."""
        self.require_tokenizer()
        assert self._tokenizer is not None
        return self._tokenizer

    def require_tokenizer(self) -> None:
        """Raise `RequestError` with the reason when there is no tokenizer."""
        if self._tokenizer is None:
            raise RequestError(
                f"this needs a tokenizer: {self._absence}; pass prompt_token_ids and detokenize=False to do without"
            )

    @property
    def eos_token_id(self) -> int | None:
        """Return the tokenizer's end-of-sequence token, if any."""
        return self._tokenizer.eos_token_id if self._tokenizer else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, not {type(text).__name__}")
        check_encodable("prompt", text)
        return self.tokenizer.encode(text, add_special_tokens)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Return the tokens of two texts as the tokenizer puts a pair together."""
        for text in (first, second):
            if not isinstance(text, str):
                raise RequestError(f"a query and a document must be text, not {type(text).__name__}")
            check_encodable("prompt", text)
        return self.tokenizer.encode_pair(first, second)

    def definition(self) -> str:
        """Return the tokenizer as the text of a `tokenizer.json`; raise `RequestError` when it has no such form."""
        definition = self.tokenizer.definition()
        if definition is None:
            raise RequestError(
                "structured output needs a tokenizer that tokenizer.json can describe, and this model's runs as code; "
                "leave structured out"
            )
        return definition

    def token_text(self, token_id: int) -> str | None:
        """Return the text of one token, None without a tokenizer."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if self._tokenizer else None


def check_encodable(name: str, text: str) -> None:
    """Raise `RequestError` when a text has no UTF-8 form: tokenizers and hashes work on its bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        raise RequestError(f"{name} holds {wrong!r} at {error.start}, which is no character; remove it") from error
