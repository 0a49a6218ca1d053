"""What each request must have said, computed from its tokens alone, without blocks, batches or a scheduler."""

from zif.contract import KVSpec
from zif.simulation.words import Words, first_visible, fold


class ExpectedText:
    """Follow one request: what does it see now, and which token must come next?"""

    def __init__(self, specs: tuple[KVSpec, ...], words: Words, token_ids: list[int]) -> None:
        self._specs = specs
        self._words = words
        self._token_ids = token_ids
        self._num_seen = 0
        self._sums = [0] * len(specs)
        self._firsts = [0] * len(specs)

    @property
    def num_checked(self) -> int:
        """Count the tokens that were given or found right."""
        return self._num_seen

    def next_token(self, num_tokens: int) -> int:
        """Return the token that follows the first `num_tokens` tokens; calls must not go back."""
        for position in range(self._num_seen, num_tokens):
            self._see(self._words.word(self._token_ids[position], position))
        self._num_seen = num_tokens
        for index, spec in enumerate(self._specs):
            if not spec.keeps_checkpoints:
                self._hide(index, first_visible(spec, num_tokens - 1))
        return self._words.next_token(tuple(self._sums))

    def _see(self, word: int) -> None:
        sums = self._sums
        for index, spec in enumerate(self._specs):
            sums[index] = fold(sums[index], word) if spec.keeps_checkpoints else sums[index] + word

    def _hide(self, index: int, first: int) -> None:
        for position in range(self._firsts[index], first):
            self._sums[index] -= self._words.word(self._token_ids[position], position)
        self._firsts[index] = first
