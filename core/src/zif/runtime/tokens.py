"""The known tokens of every request that the runner holds, as one array that batch building indexes at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


class TokenTable:
    """Rows of tokens. Row r is in use when the runner gave it to a request.

    tokens: [max_rows, capacity], int32; entries from `num_tokens[r]` on are undefined, but for a draft that the current
    step verifies. num_tokens, num_prompt_tokens: [max_rows], int64. The capacity grows with the longest request.
    """

    def __init__(self, max_rows: int, capacity: int = 256) -> None:
        self.tokens = np.zeros((max_rows, capacity), dtype=np.int32)
        self.num_tokens = np.zeros(max_rows, dtype=np.int64)
        self.num_prompt_tokens = np.zeros(max_rows, dtype=np.int64)

    def set_row(self, row: int, token_ids: list[int], num_prompt_tokens: int) -> None:
        """Put a request's known tokens into `row`."""
        self._grow(len(token_ids) + 1)
        self.tokens[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = len(token_ids)
        self.num_prompt_tokens[row] = num_prompt_tokens

    def put_draft(self, row: int, token_ids: list[int]) -> None:
        """Put guessed tokens behind the known ones of `row`. They do not become known."""
        start = int(self.num_tokens[row])
        self._grow(start + len(token_ids) + 1)
        self.tokens[row, start : start + len(token_ids)] = token_ids

    def put(self, rows: Int64, places: Int64, token_ids: Sequence[int] | Int64) -> None:
        """Make `token_ids[s]` the known token number `places[s]` of `rows[s]`, and the last one.

        rows, places: [S]. A row may come several times, with rising places.
        """
        if not len(rows):
            return
        # One place beyond the known tokens: what verification reads where there is no guess.
        self._grow(int(places.max()) + 2)
        self.tokens[rows, places] = token_ids
        self.num_tokens[rows] = places + 1

    def _grow(self, capacity: int) -> None:
        rows, current = self.tokens.shape
        if capacity > current:
            grown = np.zeros((rows, max(capacity, 2 * current)), dtype=np.int32)
            grown[:, :current] = self.tokens
            self.tokens = grown


@dataclass(frozen=True, slots=True)
class SamplePositions:
    """Where S tokens are chosen: token number `num_tokens[s]` of `rows[s]`, given the tokens before it.

    rows, num_tokens: [S], int64. A row with a draft comes once for the end of its known tokens and once for each
    guess, which then counts as known.
    """

    table: TokenTable
    rows: Int64
    num_tokens: Int64

    def ends_with(self, index: int, suffix: tuple[int, ...]) -> bool:
        """Say whether the tokens before position `index` end with `suffix`."""
        end = int(self.num_tokens[index])
        begin = end - len(suffix)
        return begin >= 0 and tuple(self.table.tokens[self.rows[index], begin:end].tolist()) == suffix

    def num_output_tokens(self) -> Int64:
        """Count the generated tokens before each position. Returns [S]."""
        return self.num_tokens - self.table.num_prompt_tokens[self.rows]

    def tokens_between(self, index: int, start: int, end: int) -> list[int]:
        """Return tokens `start` to `end - 1` of the row of position `index`."""
        tokens: list[int] = self.table.tokens[self.rows[index], start:end].tolist()
        return tokens
