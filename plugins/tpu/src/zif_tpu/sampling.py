"""Choosing tokens inside a compiled program, for requests that need nothing but a draw or the most likely token.

The rule is core's (`zif.runtime`): integer weights, one random number per position; here every filter runs for every
row, because shapes must not depend on options. S places, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from zif.runtime import (
    FRACTION_BITS,
    WEIGHT_SCALE,
    DrawOptions,
    SampledTokens,
    SamplePositions,
    Sampler,
    fraction_of,
    raw_fault,
)

_BLOCK = 512
_NUM_COLUMNS = 5
_TOKEN, _PEAK = 0, 1
_NUM_RESULTS = 2


class Choice(StrEnum):
    """What a sampling program does. Each is compiled for each number of places.

    GREEDY: the most likely token. DRAWN: that, or a draw. OPEN: the same, and the logits come along for the host.
    """

    GREEDY = "greedy"
    DRAWN = "drawn"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Places:
    """Where and how to choose, for a program of `size` places: arrays in host memory, padded.

    integers: [size, 5], int64: row of the hidden states, whether to draw, top_k - 1, top_p and the random number as
    shares of 2**62. reals: [size, 2], float32: temperature and min_p.
    """

    integers: NDArray[np.int64]
    reals: NDArray[np.float32]

    @classmethod
    def of(cls, size: int, count: int, options: tuple[NDArray[np.bool_], DrawOptions] | None = None) -> "Places":
        """Lay out `count` places, whose hidden states are rows 0 to count - 1; `options`: who draws, and how."""
        integers = np.zeros((size, _NUM_COLUMNS), dtype=np.int64)
        reals = np.tile(np.array([1.0, 0.0], dtype=np.float32), (size, 1))
        integers[:count, 0] = np.arange(count)
        if options is not None:
            draws, drawn = options
            at = np.flatnonzero(draws)
            integers[at, 1] = 1
            integers[at, 2] = drawn.top_k - 1
            integers[at, 3] = (drawn.top_p * 2.0**FRACTION_BITS).astype(np.int64)
            integers[at, 4] = drawn.fractions
            reals[at, 0], reals[at, 1] = drawn.temperature, drawn.min_p
        return cls(integers, reals)


def choice_for(sampler: Sampler, rows: NDArray[np.int64]) -> Choice:
    """Return the program that serves a step's rows."""
    if not sampler.is_plain(rows).all():
        return Choice.OPEN
    return Choice.DRAWN if sampler.draws(rows).any() else Choice.GREEDY


def places_for(sampler: Sampler, positions: SamplePositions, size: int) -> Places:
    """Return where and how a step chooses. `size` is the program's."""
    draws = sampler.draws(positions.rows) & sampler.is_plain(positions.rows)
    options = sampler.draw_options(positions.rows[draws], positions.num_tokens[draws])
    return Places.of(size, len(positions.rows), (draws, options))


def choose(logits: torch.Tensor, integers: torch.Tensor, reals: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Choose a token at each place. logits: [S, V], float32. Returns [S, 2], or [S, 2 + V] with the logits.

    One array, because a step makes one transfer to the host: token (exact in float32: below 2**21), largest logit.
    """
    # XLA's largest of numbers among which one is NaN may be any of them.
    peaks = logits.amax(1).masked_fill(logits.isnan().any(1), torch.nan)
    tokens = logits.argmax(1)
    if choice != Choice.GREEDY:
        drawn = _draw(logits, integers, reals)
        tokens = torch.where(integers[:, 1] > 0, drawn, tokens)
    columns = torch.stack((tokens.float(), peaks), dim=1)
    return torch.cat((columns, logits), dim=1) if choice == Choice.OPEN else columns


def read_choices(
    results: torch.Tensor, sampler: Sampler, positions: SamplePositions, *, has_logits: bool
) -> SampledTokens:
    """Turn what a program chose into tokens and faults; places that it could not serve are chosen here, given logits.

    results: [S, 2 or 2 + V], host memory, without padding.
    """
    tokens: list[int] = results[:, _TOKEN].long().tolist()
    faults = {index: raw_fault(peak) for index, peak in enumerate(results[:, _PEAK].tolist()) if not np.isfinite(peak)}
    unsound = {*faults}
    logprobs = {}
    here = np.flatnonzero(~sampler.is_plain(positions.rows))
    if len(here) and has_logits:
        part = SamplePositions(positions.table, positions.rows[here], positions.num_tokens[here])
        sampled = sampler.sample(results[torch.from_numpy(here), _NUM_RESULTS:].clone(), part)
        for index, token_id in zip(here.tolist(), sampled.token_ids, strict=True):
            tokens[index] = token_id
        faults |= _renumbered(sampled.faults, here.tolist())
        unsound.update(here[[*sampled.unsound]].tolist())
        logprobs = _renumbered(sampled.logprobs, here.tolist())
    logprobs = {i: value for i, value in logprobs.items() if i not in faults}
    return SampledTokens(tokens, logprobs, faults, frozenset(unsound))


def logits_of(results: torch.Tensor) -> torch.Tensor:
    """Return the logits out of the results of an open choice, [S, V]."""
    return results[:, _NUM_RESULTS:]


def _renumbered(values: dict, indices: Sequence[int]) -> dict:  # type: ignore[type-arg]
    return {indices[index]: value for index, value in values.items()}


def _draw(logits: torch.Tensor, integers: torch.Tensor, reals: torch.Tensor) -> torch.Tensor:
    """Draw one token per row after temperature, min_p, top_k and top_p. Returns [S]."""
    temperature, min_p = reals[:, 0:1], reals[:, 1:2]
    scores = (logits - logits.amax(1, keepdim=True)) / temperature
    ordered = scores.sort(dim=1, descending=True).values
    lowest = ordered.gather(1, integers[:, 2:3].clamp(max=logits.shape[1] - 1))
    weights = _weights(scores, min_p, lowest)
    falling = _weights(ordered, min_p, lowest)
    share = fraction_of(weights.sum(1), integers[:, 3])
    # The fewest of the most likely tokens that weigh the share: up to the first at which their sum reaches it.
    last = _first_above(falling, share - 1)
    kept = weights.masked_fill(scores < ordered.gather(1, last[:, None]), 0)
    return _first_above(kept, fraction_of(kept.sum(1), integers[:, 4]))


def _weights(scores: torch.Tensor, min_p: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    """Return the integer weights of tokens, zero for those that min_p or top_k exclude. [S, V], int64."""
    likelihoods = scores.exp()
    kept = (likelihoods >= min_p) & (scores >= lowest)
    return (likelihoods.masked_fill(~kept, 0.0) * WEIGHT_SCALE).long()


def _first_above(weights: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Return the first place at which the running sum exceeds `goal`, the last place if none. [S, V], [S] to [S].

    Finds the block, then the place in it: a running sum over a whole vocabulary is costly to compile and to run.
    """
    num_rows, vocab_size = weights.shape
    num_blocks = -(-vocab_size // _BLOCK)
    blocks = torch.nn.functional.pad(weights, (0, num_blocks * _BLOCK - vocab_size)).view(num_rows, num_blocks, _BLOCK)
    sums = blocks.sum(2)
    running = sums.cumsum(1)
    block = (running <= goal[:, None]).sum(1, keepdim=True).clamp(max=num_blocks - 1)
    before = running.gather(1, block) - sums.gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1).cumsum(1)
    place = block * _BLOCK + (before + inside <= goal[:, None]).sum(1, keepdim=True)
    return place.squeeze(1).clamp(max=vocab_size - 1)
