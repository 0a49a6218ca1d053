"""What each request must have said, computed from its tokens alone, without blocks, batches or a scheduler."""

from collections.abc import Callable

from zif.contract import KVSpec
from zif.simulation.words import Words, encoder_word, fold, visibility


class ExpectedText:
    """Follow one request: what does it see now, and which token must come next?"""

    def __init__(
        self,
        specs: tuple[KVSpec, ...],
        words: Words,
        token_ids: list[int],
        media: tuple[str, ...] = (),
        num_encoder_tokens: int = 0,
    ) -> None:
        self._specs = specs
        self._states = [index for index, spec in enumerate(specs) if spec.keeps_checkpoints]
        encoded = [index for index, spec in enumerate(specs) if spec.counts_encoder_tokens]
        self._sums_of = [index for index in range(len(specs)) if index not in (*self._states, *encoded)]
        self._bounded = _bounded_groups(specs)
        self._words = words
        self._token_ids = token_ids
        self._num_seen = 0
        self._sums = [0] * len(specs)
        for index in encoded:
            self._sums[index] = sum(encoder_word(media, position) for position in range(num_encoder_tokens))
        self._firsts = [0] * len(specs)
        self._is_plain = len(specs) == len(self._sums_of) == 1 and not self._bounded

    @property
    def num_checked(self) -> int:
        """Count the tokens that were given or found right."""
        return self._num_seen

    def fork(self, token_ids: list[int]) -> "ExpectedText":
        """Return a copy that goes on along `token_ids`, which begin with the tokens seen so far."""
        text = ExpectedText(self._specs, self._words, token_ids)
        text._num_seen, text._sums, text._firsts = self._num_seen, self._sums.copy(), self._firsts.copy()
        return text

    def next_token(self, num_tokens: int) -> int:
        """Return the token that follows the first `num_tokens` tokens; calls must not go back."""
        words, sums, token_ids = self._words.by_place, self._sums, self._token_ids
        vocab_size = self._words.vocab_size
        if self._is_plain and self._num_seen == num_tokens - 1:
            # Most tokens of most simulations, without the loops below.
            self._num_seen = num_tokens
            sums[0] += words[num_tokens * vocab_size - vocab_size + token_ids[num_tokens - 1]]
            return self._words.next_tokens[(sums[0],)]
        for position in range(self._num_seen, num_tokens):
            word = words[position * vocab_size + token_ids[position]]
            for index in self._sums_of:
                sums[index] += word
            for index in self._states:
                sums[index] = fold(sums[index], word)
        self._num_seen = num_tokens
        for index, visible_from in self._bounded:
            first = visible_from(num_tokens - 1)
            for position in range(self._firsts[index], first):
                sums[index] -= words[position * vocab_size + token_ids[position]]
            self._firsts[index] = first
        return self._words.next_tokens[tuple(sums)]


def _bounded_groups(specs: tuple[KVSpec, ...]) -> list[tuple[int, Callable[[int], int]]]:
    """Return the groups in which earlier tokens go out of sight, with the rule of each."""
    rules = [None if spec.keeps_checkpoints or spec.counts_encoder_tokens else visibility(spec) for spec in specs]
    return [(index, rule) for index, rule in enumerate(rules) if rule is not None]
