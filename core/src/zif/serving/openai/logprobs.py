"""Log-probabilities as the two APIs write them: parallel lists for completions, a list of objects for chats.

A long answer has hundreds of thousands of them. What belongs to a position is encoded when it comes, and a prompt's in
slices: encoding everything at the end would hold up everybody else for as long as that takes.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import lru_cache
from typing import TypeVar, cast

import msgspec

from zif.serving.answers import PositionLogprobs, TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

REPLACEMENT = "\ufffd"
LOWEST_LOGPROB = -9999.0
"""What OpenAI's API writes for a token that cannot come; JSON has no minus infinity."""

POSITIONS_PER_TURN = 256
"""Written in some milliseconds, with twenty candidates each."""

_encode = msgspec.json.Encoder().encode

T = TypeVar("T")

Spelling = Callable[[int], str | None]
"""Gives a token as the vocabulary spells it, None for an id without a token."""


class TopLogprob(msgspec.Struct, frozen=True):
    """One candidate. `bytes` are those of the token, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """The chosen token of a position and the most likely ones."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of the tokens of a message or chunk, reasoning and markers included."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry a token. The first token of an echoed prompt has None."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True):
    """One candidate of a position of the prompt."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""By position, then by token id; the first position is None."""


class TokenNames:
    """How tokens are written: as text, or as `token_id:<id>` when the caller asked for that.

    `spelling` gives a token as the vocabulary spells it; bytes that make no character are recovered from it.
    """

    def __init__(self, spelling: Spelling, as_ids: bool) -> None:
        self._spelling = spelling
        self._as_ids = as_ids

    def text(self, token: TokenLogprob) -> str:
        """Return the token's text for chats."""
        return f"token_id:{token.token_id}" if self._as_ids else token.text or ""

    def completion_text(self, token: TokenLogprob) -> str:
        """Return the token's text for completions, where bytes that make no character are spelled out."""
        text = token.text or ""
        if self._as_ids or REPLACEMENT not in text:
            return self.text(token)
        raw = self.bytes(token)
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes(self, token: TokenLogprob) -> list[int] | None:
        """Return the token's bytes; None where the vocabulary does not tell them."""
        text = token.text or ""
        if REPLACEMENT not in text:
            return list(text.encode("utf-8", "replace"))
        return bytes_of_spelling(self._spelling(token.token_id))


def bytes_of_spelling(spelling: str | None) -> list[int] | None:
    """Return the bytes of a token that is spelled `<0xAB>` or in the alphabet of byte-level BPE, None for others."""
    if spelling is None:
        return None
    if _BYTE_TOKEN.fullmatch(spelling):
        return [int(spelling[3:5], 16)]
    alphabet = byte_alphabet()
    if all(character in alphabet for character in spelling):
        return [alphabet[character] for character in spelling]
    return None


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Return which character stands for which byte in byte-level BPE (GPT-2's `bytes_to_unicode`).

    Bytes that print stand for themselves; the others follow one another from U+0100 on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


def written(value: T) -> T:
    """Return a value as JSON, which stands for it in whatever is encoded later."""
    return cast("T", msgspec.Raw(_encode(value)))


async def sliced(positions: Sequence[T]) -> AsyncGenerator[Sequence[T], None]:
    """Give positions slice by slice, with a turn for others after each."""
    for begin in range(0, len(positions), POSITIONS_PER_TURN):
        yield positions[begin : begin + POSITIONS_PER_TURN]
        await asyncio.sleep(0)


def chat_logprobs(positions: Sequence[PositionLogprobs], num_top: int, names: TokenNames) -> ChatLogprobs:
    """Return the log-probabilities of a piece of a chat's answer, with the `num_top` most likely tokens of each."""
    return ChatLogprobs([_chat_position(position, num_top, names) for position in positions])


def _chat_position(position: PositionLogprobs, num_top: int, names: TokenNames) -> ChatTokenLogprob:
    chosen = position[0]
    top = sorted(position, key=_falling)[:num_top]
    return ChatTokenLogprob(
        names.text(chosen),
        finite(chosen.logprob),
        names.bytes(chosen),
        [TopLogprob(names.text(token), finite(token.logprob), names.bytes(token)) for token in top],
    )


class CompletionLogprobsWriter:
    """Writes one sample's positions as they come; `text_offset` counts on from piece to piece."""

    def __init__(self, num_top: int, names: TokenNames, offset: int = 0) -> None:
        self.offset = offset
        self._num_top = num_top
        self._names = names

    def write(self, positions: Sequence[PositionLogprobs | None], first: str = "") -> CompletionLogprobs:
        """Return the lists for more positions. A position of None is a prompt's first, whose token is `first`."""
        tokens, chosen, tops, offsets = [], [], [], []
        for position in positions:
            token = first if position is None else self._names.completion_text(position[0])
            tokens.append(token)
            chosen.append(None if position is None else finite(position[0].logprob))
            tops.append(None if position is None or not self._num_top else written(self._top(position)))
            offsets.append(self.offset)
            self.offset += len(first if position is None else position[0].text or "")
        return CompletionLogprobs(offsets, chosen, tokens, tops)

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """Return the most likely tokens by text, the chosen one always; of equal texts the first counts."""
        top: dict[str, float] = {}
        for token in [position[0], *sorted(position[1:], key=_falling)[: self._num_top]]:
            top.setdefault(self._names.completion_text(token), finite(token.logprob))
        return top


def joined_logprobs(pieces: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Return the lists of pieces that follow one another."""
    return CompletionLogprobs(
        text_offset=[offset for piece in pieces for offset in piece.text_offset],
        token_logprobs=[logprob for piece in pieces for logprob in piece.token_logprobs],
        tokens=[token for piece in pieces for token in piece.tokens],
        top_logprobs=[top for piece in pieces for top in piece.top_logprobs],
    )


async def prompt_logprobs(positions: Sequence[PositionLogprobs | None]) -> PromptLogprobs:
    """Return a prompt's log-probabilities by token id."""
    by_id: PromptLogprobs = []
    async for some in sliced(positions):
        by_id += [None if position is None else written(_by_id(position)) for position in some]
    return by_id


def _by_id(position: PositionLogprobs) -> dict[int, PromptLogprob]:
    return {token.token_id: PromptLogprob(finite(token.logprob), token.rank, token.text) for token in position}


def _falling(token: TokenLogprob) -> float:
    return -token.logprob


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can write; a token that was ruled out has minus infinity."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
