"""The arithmetic of the null platform in plain integers: what a token's word is, and which token follows.

It gives the same tokens as `zif.null.runner` (a test compares them), without arrays and with what was computed
remembered: most steps of a simulation compute one token for each of a few requests, where arrays cost more than they
save. Runner and oracle share these pure functions and nothing else.
"""

from collections.abc import Callable
from zlib import crc32

from zif.contract import ChunkedLocalSpec, FullAttentionSpec, KVSpec, LatentAttentionSpec, SlidingWindowSpec

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MAX_WORDS = 1 << 17
_MAX_NEXT_TOKENS = 1 << 14
"""Few, so that they stay in the processor's cache: the oracle asks for a token soon after the runner did."""

Visibility = Callable[[int], int] | None
"""The first position that the token at a position sees; None where that is always the first."""


def encoder_word(media: tuple[str, ...], position: int) -> int:
    """Return the word of a token of the encoder's input."""
    return mix(crc32("\n".join(media).encode()) + mix((position * _GOLDEN + _GOLDEN) & _MASK) & _MASK)


Sums = tuple[int, ...]
"""Per layer group, the sum of the visible words, or the state."""


def mix(word: int) -> int:
    """Scramble a 64-bit word (the finalizer of SplitMix64; Steele, Lea and Flood, 2014)."""
    word = (word ^ (word >> 30)) * _MIX_1 & _MASK
    word = (word ^ (word >> 27)) * _MIX_2 & _MASK
    return word ^ (word >> 31)


def fold(state: int, word: int) -> int:
    """Return the recurrent state after one more token."""
    return mix((state + _GOLDEN & _MASK) ^ word)


def visibility(spec: KVSpec) -> Visibility:
    """Return the first position that the token at a position sees, as a function; None where every token sees all.

    Written apart from the retention rules of the block manager for the kinds known here, so that an error in one of
    those shows; a kind from elsewhere is taken at its word.
    """
    if isinstance(spec, FullAttentionSpec | LatentAttentionSpec):
        return None
    if isinstance(spec, SlidingWindowSpec):
        behind = spec.window - 1
        return lambda position: max(0, position - behind)
    if isinstance(spec, ChunkedLocalSpec):
        chunk = spec.chunk
        return lambda position: position - position % chunk
    return spec.first_needed_token


class Words:
    """Words of tokens and the tokens that follow, each computed once. Share one over many simulations.

    The tables compute what they lack. They are for innermost loops; a key of `by_place` is position * vocab_size +
    token id.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.by_place = _WordTable(vocab_size)
        self.next_tokens = _NextTokenTable(vocab_size)

    def word(self, token_id: int, position: int) -> int:
        """Return the word of a token at its position."""
        return self.by_place[position * self.vocab_size + token_id]

    def next_token(self, sums: Sums) -> int:
        """Return the token that follows what the layer groups see."""
        return self.next_tokens[sums]


class _WordTable(dict[int, int]):
    __slots__ = ("_vocab_size",)

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def __missing__(self, key: int) -> int:
        position, token_id = divmod(key, self._vocab_size)
        place = mix(position * _GOLDEN + _GOLDEN & _MASK)
        if len(self) < _MAX_WORDS:
            # Its other tokens will be asked for too, sooner or later.
            first = key - token_id
            self.update((first + token, mix(token + place & _MASK)) for token in range(self._vocab_size))
        return mix(token_id + place & _MASK)


class _NextTokenTable(dict[Sums, int]):
    __slots__ = ("_vocab_size",)

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def __missing__(self, sums: Sums) -> int:
        digest = 0
        for visible in sums:
            # `mix`, written out: nearly every token of a simulation comes here once.
            word = (digest ^ (visible & _MASK)) + _GOLDEN & _MASK
            word = (word ^ (word >> 30)) * _MIX_1 & _MASK
            word = (word ^ (word >> 27)) * _MIX_2 & _MASK
            digest = word ^ (word >> 31)
        if len(self) >= _MAX_NEXT_TOKENS:
            self.clear()
        token = self[sums] = digest % self._vocab_size
        return token
