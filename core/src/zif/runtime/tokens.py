"""The known tokens of every request that the runner holds, as one array that batch building indexes at once."""

import numpy as np


class TokenTable:
    """Rows of tokens. Row r is in use when the runner gave it to a request.

    tokens: [max_rows, capacity], int32; entries from `num_tokens[r]` on are undefined. num_tokens, num_prompt_tokens:
    [max_rows], int64. The capacity grows with the longest request.
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

    def append(self, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]", token_ids: list[int]) -> None:
        """Append one token to each of `rows` ([S], distinct)."""
        lengths = self.num_tokens[rows]
        self._grow(int(lengths.max()) + 1)
        self.tokens[rows, lengths] = token_ids
        self.num_tokens[rows] = lengths + 1

    def _grow(self, capacity: int) -> None:
        rows, current = self.tokens.shape
        if capacity > current:
            grown = np.zeros((rows, max(capacity, 2 * current)), dtype=np.int32)
            grown[:, :current] = self.tokens
            self.tokens = grown
