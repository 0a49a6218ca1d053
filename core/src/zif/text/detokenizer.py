"""Text of a growing sequence of tokens, piece by piece.

The pieces together equal the decoding of all tokens at once. A token may end inside a UTF-8 character, may change
how the bytes before it are read, and loses its leading space at the start of a text; so a few tokens are decoded
again with each new one:

    tokens   | ... done ... | context | pending |
    text     | ... given out .........| held    |      give out decode(context + pending) beyond decode(context)

The engine keeps one `Detokenizer` per sequence.
"""

import re
from collections.abc import Sequence

from zif.text.tokenizer import Tokenizer, clean_up_spaces

CONTEXT_TOKENS = 8
"""Of the prompt. A character has at most four bytes: what a cut at the front breaks lies apart from the end."""

PATIENCE_TOKENS = 64
"""Pending tokens that are decoded with each new one. Beyond, only when they have doubled: the work stays linear."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CLEANUP_CUT = re.compile(r"(?<=[^ '])(?= [^ '])")


class Detokenizer:
    """The text of output tokens, as `decode(prompt + output)` continues `decode(prompt)`."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._context = self._last_tokens(prompt_ids)
        self._given = self._text(self._context)
        self._pending: list[int] = []
        self._next_try = 1
        self._cleaner = SpaceCleaner(self._given) if tokenizer.cleans_up_spaces else None

    def append(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the new text; it never ends inside a character."""
        self._pending += [token_id for token_id in token_ids if self._is_shown(token_id)]
        if len(self._pending) < self._next_try:
            return ""
        return self._clean(self._advance())

    def finish(self) -> str:
        """Return the text still held; bytes that make no character become U+FFFD."""
        text = self._text(self._context + self._pending)[len(self._given) :]
        self._context, self._given, self._pending = [], "", []
        return text if self._cleaner is None else self._cleaner.append(text) + self._cleaner.finish()

    def _advance(self) -> str:
        num_pending = len(self._pending)
        self._next_try = num_pending + 1
        # How a run of byte tokens is read is open until it ends: one bad byte makes all of them U+FFFD.
        if self._is_byte(self._pending[-1]):
            return ""
        text = self._text(self._context + self._pending)
        new = text[len(self._given) :]
        if not new or text.endswith("\ufffd"):
            self._next_try = num_pending + 1 if num_pending < PATIENCE_TOKENS else 2 * num_pending
            return ""
        self._context, self._pending, self._next_try = self._pending, [], 1
        self._given = self._text(self._context)
        return new

    def _text(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode_raw(token_ids, skip_special_tokens=False)

    def _clean(self, text: str) -> str:
        return text if self._cleaner is None else self._cleaner.append(text)

    def _is_shown(self, token_id: int) -> bool:
        return token_id not in self._hidden and self._tokenizer.token_text(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        return _BYTE_TOKEN.fullmatch(self._tokenizer.token_text(token_id) or "") is not None

    def _last_tokens(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the shown tokens at the end of the prompt, from before the last run of byte tokens on."""
        last: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(last) >= CONTEXT_TOKENS and not self._is_byte(last[-1]):
                break
            if self._is_shown(token_id):
                last.append(token_id)
        return last[::-1]


class SpaceCleaner:
    """`clean_up_spaces` for text that arrives in pieces, after the text `before`.

    Text is cut only where no removal can reach across: before a space, with no space or apostrophe on either side.
    """

    def __init__(self, before: str) -> None:
        self._held = before[_last_cut(before) :]
        self._num_given = len(clean_up_spaces(self._held))

    def append(self, text: str) -> str:
        """Take new text and return what can be cleaned now."""
        self._held += text
        cut = _last_cut(self._held)
        ready, self._held = self._held[:cut], self._held[cut:]
        return self._new(ready)

    def finish(self) -> str:
        """Return the rest."""
        rest, self._held = self._held, ""
        return self._new(rest)

    def _new(self, text: str) -> str:
        cleaned = clean_up_spaces(text)
        new = cleaned[self._num_given :]
        self._num_given = max(0, self._num_given - len(cleaned))
        return new


def _last_cut(text: str) -> int:
    cut = 0
    for match in _CLEANUP_CUT.finditer(text):
        cut = match.start()
    return cut
