"""Cases of choosing tokens, and the answers, in float64 and integers of any size: written apart from core's drawing.

A case aims: the random number lies in the middle of the tokens that it should give, and the borders of its filters lie
in the middle between two tokens, so that the last bits of a device's exponential decide nothing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import DrawOptions

ONE = 2**62
"""The denominator of shares."""

NO_LIMIT = 1 << 40

_WEIGHT_SCALE = 2.0**40
_LEAST_SHARE = 1e-4
"""Of all weight: less is no target, because the last bits of the others would move it away from its number."""


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How one row is drawn."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = NO_LIMIT
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Choices:
    """Rows with their options and the tokens that they must give. logits: [S, V], float32. token_ids: [S], int64."""

    logits: torch.Tensor
    options: DrawOptions
    token_ids: torch.Tensor

    def rows(self, indices: list[int]) -> "Choices":
        """Return some of the rows, in this order."""
        names = ("temperature", "min_p", "top_k", "top_p", "fractions")
        options = DrawOptions(*(getattr(self.options, name)[indices] for name in names))
        return Choices(self.logits[indices], options, self.token_ids[indices])


def drawn_rows(logits: torch.Tensor, rows: list[RowOptions], seed: int = 0) -> Choices:
    """Aim each row at one of the tokens that its options leave. logits: [S, V], finite somewhere in each row."""
    targets = np.random.default_rng(seed)
    token_ids, fractions = [], []
    for row, options in zip(logits, rows, strict=True):
        weights = kept_weights(row, options)
        total = int(sum(weights))
        likely = [token for token, weight in enumerate(weights) if weight >= _LEAST_SHARE * total and weight > 0]
        token = likely[int(targets.integers(len(likely)))]
        before = sum(weights[:token])
        fractions.append((2 * before + weights[token]) * ONE // (2 * total))
        token_ids.append(token)
    return Choices(logits, draw_options(rows, fractions), torch.tensor(token_ids))


def draw_options(rows: list[RowOptions], fractions: list[int]) -> DrawOptions:
    """Return the columns of the contract."""
    return DrawOptions(
        temperature=np.array([row.temperature for row in rows], dtype=np.float32),
        min_p=np.array([row.min_p for row in rows], dtype=np.float32),
        top_k=np.array([row.top_k for row in rows], dtype=np.int64),
        top_p=np.array([row.top_p for row in rows], dtype=np.float64),
        fractions=np.array(fractions, dtype=np.int64),
    )


def kept_weights(logits: torch.Tensor, options: RowOptions) -> list[int]:
    """Return the weight of every token, 0 where a filter drops it. logits: [V]."""
    scores = _scores(logits, options.temperature)
    likelihoods = np.exp(scores)
    likelihoods[likelihoods < options.min_p] = 0.0
    if options.top_k < len(scores):
        likelihoods[scores < np.sort(scores)[-options.top_k]] = 0.0
    weights = [int(likelihood * _WEIGHT_SCALE) for likelihood in likelihoods]
    if options.top_p < 1:
        goal = sum(weights) * int(options.top_p * ONE) // ONE
        mass = 0
        for token in np.argsort(-scores, kind="stable"):
            mass += weights[token]
            if mass >= goal:
                break
        weights = [weight if scores[i] >= scores[token] else 0 for i, weight in enumerate(weights)]
    return weights


def min_p_that_keeps(logits: torch.Tensor, temperature: float, count: int) -> float:
    """Return a min_p between the likelihoods of two neighbours, so that `count` tokens pass."""
    ordered = np.sort(np.exp(_scores(logits, temperature)))[::-1]
    return float((ordered[count - 1] + ordered[count]) / 2)


def top_p_that_keeps(logits: torch.Tensor, temperature: float, count: int) -> float:
    """Return a share in the middle of the last token that it lets through, so that `count` tokens pass."""
    ordered = np.sort(np.exp(_scores(logits, temperature)))[::-1]
    return float((ordered[: count - 1].sum() + ordered[count - 1] / 2) / ordered.sum())


def zipf_logits(rows: int, vocab_size: int, power: float = 1.2, seed: int = 0) -> torch.Tensor:
    """Return logits, [rows, vocab_size], float32, no two in a row equal: likelihoods (1 + rank)**-power, shuffled."""
    values = -power * torch.log1p(torch.arange(vocab_size, dtype=torch.float64))
    shuffle = torch.Generator().manual_seed(seed)
    return torch.stack([values[torch.randperm(vocab_size, generator=shuffle)] + row % 7 for row in range(rows)]).float()


def _scores(logits: torch.Tensor, temperature: float) -> NDArray[np.float64]:
    wide = logits.double().numpy()
    found: NDArray[np.float64] = (wide - wide.max()) / float(np.float32(temperature))
    return found
