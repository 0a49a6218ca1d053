"""What each request must have said, computed from its tokens alone, without blocks, batches or a scheduler."""

from collections.abc import Callable

from zif.contract import KVSpec
from zif.simulation.words import Words, fold, visibility


class ExpectedText:
    """Follow one request: what does it see now, and which token must come next?"""

    def __init__(self, specs: tuple[KVSpec, ...], words: Words, token_ids: list[int]) -> None:
        self._is_state = [spec.keeps_checkpoints for spec in specs]
        self._bounded = _bounded_groups(specs)
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
        for index, visible_from in self._bounded:
            self._hide(index, visible_from(num_tokens - 1))
        return self._words.next_token(tuple(self._sums))

    def _see(self, word: int) -> None:
        sums = self._sums
        for index, is_state in enumerate(self._is_state):
            sums[index] = fold(sums[index], word) if is_state else sums[index] + word

    def _hide(self, index: int, first: int) -> None:
        for position in range(self._firsts[index], first):
            self._sums[index] -= self._words.word(self._token_ids[position], position)
        self._firsts[index] = first


def _bounded_groups(specs: tuple[KVSpec, ...]) -> list[tuple[int, Callable[[int], int]]]:
    """Return the groups in which earlier tokens go out of sight, with the rule of each."""
    rules = [None if spec.keeps_checkpoints else visibility(spec) for spec in specs]
    return [(index, rule) for index, rule in enumerate(rules) if rule is not None]
