"""Repetition, frequency and presence penalties over the tokens that a request has.

Not a table of vocabulary size per row: a row keeps its distinct tokens with their counts and follows the token table
step by step. The sampler owns one `Penalties`.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract.sampling import SamplingParams
from zif.contract.step import RequestStart
from zif.runtime.logit_rules import LogitRule
from zif.runtime.tokens import SamplePositions

N = TypeVar("N", np.int64, np.float32)


@dataclass(slots=True, eq=False)
class TokenCounts:
    """The distinct tokens of one request, rising, with how often the output has each (0: the prompt only).

    `num_seen` counts the known tokens that are counted in.
    """

    sampling: SamplingParams
    num_seen: int
    token_ids: NDArray[np.int64]
    counts: NDArray[np.float32]

    def extend(self, token_ids: list[int]) -> None:
        """Count newly generated tokens."""
        for token_id in token_ids:
            at = int(np.searchsorted(self.token_ids, token_id))
            if at == len(self.token_ids) or self.token_ids[at] != token_id:
                self.token_ids = np.insert(self.token_ids, at, token_id)
                self.counts = np.insert(self.counts, at, 0.0)
            self.counts[at] += 1
        self.num_seen += len(token_ids)

    def extended(self, token_ids: list[int]) -> "TokenCounts":
        """Return the counts with more tokens, and leave these as they are."""
        if not token_ids:
            return self
        longer = TokenCounts(self.sampling, self.num_seen, self.token_ids, self.counts.copy())
        longer.extend(token_ids)
        return longer


class Penalties(LogitRule[TokenCounts]):
    """`repetition_penalty` on prompt and output tokens, then `frequency_penalty` and `presence_penalty` on output.

    Source of the repetition penalty: Keskar et al., "CTRL", 2019 (section 4.1), with the logit multiplied instead of
    divided where it is negative, as all engines do; of the other two: the OpenAI API reference.
    """

    def read(self, start: RequestStart) -> TokenCounts | None:
        sampling = start.sampling
        if sampling.repetition_penalty == 1 and not sampling.frequency_penalty and not sampling.presence_penalty:
            return None
        known = np.array(start.token_ids, dtype=np.int64)
        prompt, output = known[: start.num_prompt_tokens], known[start.num_prompt_tokens :]
        # A prompt token that a model of this vocabulary cannot produce has no logit to lower.
        prompt = prompt[prompt < self.vocab_size] if sampling.repetition_penalty != 1 else prompt[:0]
        token_ids, where = np.unique(np.concatenate([prompt, output]), return_inverse=True)
        counts = np.bincount(where[len(prompt) :], minlength=len(token_ids)).astype(np.float32)
        return TokenCounts(sampling, len(known), token_ids, counts)

    def apply(self, logits: torch.Tensor, positions: SamplePositions) -> None:
        held = [(index, self._at(positions, index, state)) for index, state in self.held_by(positions.rows)]
        present = [(index, state) for index, state in held if len(state.token_ids)]
        if present:
            _penalize(logits, [index for index, _ in present], [state for _, state in present])

    def _at(self, positions: SamplePositions, index: int, state: TokenCounts) -> TokenCounts:
        """Count in what is known by now, then return the counts at a position, guesses before it included."""
        num_known = int(positions.table.num_tokens[positions.rows[index]])
        state.extend(positions.tokens_between(index, state.num_seen, num_known))
        guesses = positions.tokens_between(index, num_known, int(positions.num_tokens[index]))
        # What follows a guess that the model cannot produce is refused, whatever its penalties.
        return state.extended([token_id for token_id in guesses if token_id < self.vocab_size])


def _penalize(logits: torch.Tensor, batch: list[int], states: list[TokenCounts]) -> None:
    token_ids = torch.from_numpy(_padded([state.token_ids for state in states])).to(logits.device)
    counts = torch.from_numpy(_padded([state.counts for state in states])).to(logits.device)
    factors = [
        (s.sampling.repetition_penalty, s.sampling.frequency_penalty, s.sampling.presence_penalty) for s in states
    ]
    repetition, frequency, presence = torch.tensor(factors, device=logits.device).T.unsqueeze(2)
    at = torch.tensor(batch, device=logits.device).unsqueeze(1), token_ids
    chosen = logits[at]
    chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    logits[at] = chosen - frequency * counts - presence * (counts > 0)


def _padded(columns: list[NDArray[N]]) -> NDArray[N]:
    """Stack columns of unequal length. A short one repeats its first entry: writing that token twice is harmless."""
    width = max(len(column) for column in columns)
    out = np.empty((len(columns), width), dtype=columns[0].dtype)
    for index, column in enumerate(columns):
        out[index, : len(column)] = column
        out[index, len(column) :] = column[0]
    return out
