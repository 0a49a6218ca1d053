"""Options that change single logits before a token is chosen: bias, allowed tokens, bad words, minimum length.

A rule holds what the rows with its option need and touches no other row. The sampler owns one of each and applies
them in its order. Penalties are rules too and live in `penalties`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract.step import RequestStart
from zif.errors import RequestError
from zif.runtime.tokens import SamplePositions

T = TypeVar("T")


class LogitRule(ABC, Generic[T]):
    """One option, as what it keeps per row (T) and how it changes logits.

    Subclasses answer `read` and `apply`; a row without the option costs nothing.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._held = np.zeros(max_rows, dtype=np.bool_)
        self._values: dict[int, T] = {}

    @abstractmethod
    def read(self, start: RequestStart) -> T | None:
        """Return what the option of this request needs, None when the request does not use it."""

    @abstractmethod
    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        """Change the logits of the rows that hold the option, in place. logits: [S, V], float32."""

    def add(self, row: int, start: RequestStart) -> None:
        """Take a request into `row`. Raises RequestError for a token that the vocabulary does not have."""
        value = self.read(start)
        if value is not None:
            self._values[row] = value
            self._held[row] = True

    def fault(self, row: int) -> str | None:
        """Say why the option leaves `row` no token, where that is a fault of its own."""
        return None

    def remove(self, row: int) -> None:
        """Forget what `row` held, if anything."""
        self._values.pop(row, None)
        self._held[row] = False

    def concerns(self, rows: NDArray[np.int64]) -> bool:
        """Say whether any of `rows` holds the option."""
        return bool(self._values) and bool(self._held[rows].any())

    def holds(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which of `rows` hold the option. rows: [S]. Returns [S]."""
        return self._held[rows]

    def held_by(self, rows: NDArray[np.int64]) -> list[tuple[int, T]]:
        """Return (index into `rows`, what the row holds) of the rows with the option."""
        return [(index, self._values[int(rows[index])]) for index in np.flatnonzero(self._held[rows]).tolist()]

    def checked_ids(self, option: str, token_ids: Sequence[int]) -> list[int]:
        """Return `token_ids` as a list. Raises RequestError when one lies outside the vocabulary."""
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{option}: token id {token_id!r} is not in the vocabulary of {self.vocab_size} tokens;"
                    " take ids of this model's tokenizer"
                )
        return list(token_ids)


class LogitBias(LogitRule[dict[int, float]]):
    """`logit_bias`: a number added to the logit of a token."""

    def read(self, start: RequestStart) -> dict[int, float] | None:
        bias = start.sampling.logit_bias
        return dict(zip(self.checked_ids("logit_bias", list(bias)), bias.values(), strict=True)) if bias else None

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        held = self.held_by(positions.rows)
        at = _positions(logits, [(index, list(bias)) for index, bias in held])
        values = torch.tensor([value for _, bias in held for value in bias.values()], device=logits.device)
        logits[at] += values


class AllowedTokens(LogitRule[list[int]]):
    """`allowed_token_ids`: every other token is excluded."""

    def read(self, start: RequestStart) -> list[int] | None:
        allowed = start.sampling.allowed_token_ids
        return None if allowed is None else self.checked_ids("allowed_token_ids", allowed)

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        held = self.held_by(positions.rows)
        at = _positions(logits, held)
        allowed = logits[at]
        logits.index_fill_(0, torch.tensor([index for index, _ in held], device=logits.device), -torch.inf)
        logits[at] = allowed


class BadWords(LogitRule[list[tuple[int, ...]]]):
    """`bad_words`: the last token of a word is excluded where the known tokens end with the word's other tokens."""

    def read(self, start: RequestStart) -> list[tuple[int, ...]] | None:
        words = [tuple(self.checked_ids("bad_words", word)) for word in start.bad_words_ids if word]
        return words or None

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        excluded = [
            (index, [word[-1] for word in words if positions.ends_with(index, word[:-1])])
            for index, words in self.held_by(positions.rows)
        ]
        logits[_positions(logits, excluded)] = -torch.inf


@dataclass(frozen=True, slots=True)
class _Minimum:
    num_tokens: int
    stop_ids: list[int]
    has_form: bool


class MinTokens(LogitRule[_Minimum]):
    """`min_tokens`: the tokens that would end the request are excluded until the output is long enough.

    They stay where the form of the answer allows nothing else: what is complete cannot go on. So this applies after
    the form.
    """

    def read(self, start: RequestStart) -> _Minimum | None:
        if not start.sampling.min_tokens or not start.stop_ids:
            return None
        # A stop id that the model cannot produce needs no exclusion.
        stop_ids = [i for i in sorted(start.stop_ids) if 0 <= i < self.vocab_size]
        return _Minimum(start.sampling.min_tokens, stop_ids, start.sampling.structured is not None)

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        num_output = positions.num_output_tokens()
        held = [(index, one) for index, one in self.held_by(positions.rows) if num_output[index] < one.num_tokens]
        with_form = [(index, one.stop_ids) for index, one in held if one.has_form]
        formed = _positions(logits, with_form)
        ends = logits[formed]
        logits[_positions(logits, [(index, one.stop_ids) for index, one in held])] = -torch.inf
        if with_form:
            # A vocabulary a row, not one for each stop id, of which a request may have a thousand.
            rows = torch.tensor([index for index, _ in with_form], device=logits.device)
            nothing_else = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            nothing_else[rows] = logits[rows].amax(dim=1) == -torch.inf
            logits[formed] = ends.where(nothing_else[formed[0]], -torch.inf)


def _positions(logits: torch.Tensor, chosen: Sequence[tuple[int, Sequence[int]]]) -> tuple[torch.Tensor, ...]:
    """Return the index of (batch index, token ids) pairs into logits, as two tensors of equal length."""
    batch = [index for index, token_ids in chosen for _ in token_ids]
    vocabulary = [token_id for _, token_ids in chosen for token_id in token_ids]
    return tuple(torch.tensor([batch, vocabulary], dtype=torch.int64, device=logits.device))
