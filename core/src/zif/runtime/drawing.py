"""Draw tokens from logits: temperature, min_p, top_k, top_p, then the inverse of the cumulative distribution.

Probabilities are integers here, `floor(2**40 * p / p_max)`: integer sums are exact in any order, so a row gives the
same token alone and in any batch, on any device, without float64. A token less likely than 2**-40 (1e-12) of the most
likely one has weight zero and is never drawn. Every filter keeps the tokens whose logit reaches a threshold, so tokens
that tie at the border are kept together, as Hugging Face's top-k does. The sampler calls `draw_tokens`.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from zif.contract import DrawOptions
from zif.runtime.randomness import FRACTION_BITS

MAX_VOCAB_SIZE = 2**21
"""Weights of this many tokens sum to at most 2**61, which leaves `fraction_of` room in int64."""

WEIGHT_SCALE = 2.0**40
CHUNK_ELEMENTS = 2**22
"""Logits handled at once: about 100 MB of working memory, whatever the batch."""

NUCLEUS_CANDIDATES = 512
"""Most likely tokens that top_p looks at first; they nearly always hold its mass. Otherwise it looks at more."""

NUCLEUS_GROWTH = 16

BLOCK = 512


def draw_tokens(logits: torch.Tensor, batch: NDArray[np.int64], options: DrawOptions) -> torch.Tensor:
    """Draw one token for each of the rows `batch` of logits.

    logits: [S, V], float32, finite maximum per row (otherwise that row's token is arbitrary). batch: [R].
    options: of R rows, with temperatures above 0.
    Returns [R], int64, on the device of logits.
    """
    rows_at_once = max(1, CHUNK_ELEMENTS // logits.shape[1])
    drawn = []
    for begin in range(0, len(batch), rows_at_once):
        end = begin + rows_at_once
        chunk = logits.index_select(0, torch.from_numpy(batch[begin:end]).to(logits.device))
        drawn.append(_draw_chunk(chunk, options.part(begin, end)))
    return torch.cat(drawn)


def _draw_chunk(logits: torch.Tensor, options: DrawOptions) -> torch.Tensor:
    """Draw one token per row. logits: [R, V], overwritten."""
    device, (num_rows, vocab_size) = logits.device, logits.shape
    temperature = torch.from_numpy(options.temperature).to(device).unsqueeze(1)
    # The maximum goes to zero first: dividing large logits by a small temperature would overflow.
    scores = logits.sub_(logits.amax(dim=1, keepdim=True)).div_(temperature)
    likelihoods = scores.exp()
    if options.min_p.any():
        likelihoods *= likelihoods >= torch.from_numpy(options.min_p).to(device).unsqueeze(1)
    candidates = scores.topk(_num_candidates(options, vocab_size), dim=1)
    if (options.top_k < vocab_size).any():
        likelihoods *= scores >= _top_k_threshold(candidates, options, vocab_size)
    num_blocks = -(-vocab_size // BLOCK)
    padded = torch.zeros(num_rows, num_blocks * BLOCK, dtype=torch.int64, device=device)
    weights = padded[:, :vocab_size]
    weights.copy_(likelihoods.mul_(WEIGHT_SCALE))
    if (options.top_p < 1).any():
        weights *= scores >= _top_p_threshold(scores, weights, candidates, options)
    fractions = torch.from_numpy(options.fractions).to(device)
    return _invert(padded.view(num_rows, num_blocks, BLOCK), fractions).clamp_(max=vocab_size - 1)


def _num_candidates(options: DrawOptions, vocab_size: int) -> int:
    """Return how many of the most likely tokens the filters of these rows look at."""
    by_count = options.top_k < vocab_size
    most = int(options.top_k[by_count].max(initial=0))
    if ((options.top_p < 1) & ~by_count).any():
        most = max(most, min(NUCLEUS_CANDIDATES, vocab_size))
    return most


def _top_k_threshold(candidates: torch.return_types.topk, options: DrawOptions, vocab_size: int) -> torch.Tensor:
    """Return the score of the k-th most likely token, -inf where k sets no limit. Returns [R, 1]."""
    num_candidates = candidates.values.shape[1]
    last = torch.from_numpy(np.minimum(options.top_k, num_candidates) - 1).to(candidates.values.device)
    threshold = candidates.values.gather(1, last.unsqueeze(1))
    return threshold.masked_fill_(_column(options.top_k >= vocab_size, threshold), -torch.inf)


def _top_p_threshold(
    scores: torch.Tensor, weights: torch.Tensor, candidates: torch.return_types.topk, options: DrawOptions
) -> torch.Tensor:
    """Return the lowest score among the fewest tokens that hold the share p, -inf where p is 1. Returns [R, 1]."""
    unlimited = _column(options.top_p >= 1, scores)
    share = torch.from_numpy((options.top_p * 2.0**FRACTION_BITS).astype(np.int64)).to(scores.device)
    goal = fraction_of(weights.sum(dim=1), share).unsqueeze(1).masked_fill_(unlimited, 0)
    return _score_at_mass(scores, weights, goal, candidates).masked_fill_(unlimited, -torch.inf)


def _score_at_mass(
    scores: torch.Tensor, weights: torch.Tensor, goal: torch.Tensor, candidates: torch.return_types.topk
) -> torch.Tensor:
    """Return the score down to which the most likely tokens first weigh `goal` together. goal: [R, 1]. Returns [R, 1].

    candidates: the most likely tokens; where they weigh less than the goal, more are looked at.
    """
    vocab_size, num_candidates = scores.shape[1], candidates.values.shape[1]
    mass = weights.gather(1, candidates.indices).cumsum(dim=1)
    place = (mass < goal).sum(dim=1, keepdim=True)
    found = candidates.values.gather(1, place.clamp(max=num_candidates - 1))
    if num_candidates < vocab_size:
        short = (place.squeeze(1) == num_candidates).nonzero().squeeze(1)
        if len(short):
            more = scores[short].topk(min(NUCLEUS_GROWTH * num_candidates, vocab_size), dim=1)
            found[short] = _score_at_mass(scores[short], weights[short], goal[short], more)
    return found


def _invert(weights: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Return the first token at which the running sum of weights exceeds `fractions` of the total.

    Finds the block, then the token in it, in place of a running sum over the vocabulary. weights: [R, blocks, BLOCK].
    fractions: [R]. Returns [R].
    """
    sums = weights.sum(dim=2)
    running = sums.cumsum(dim=1)
    goal = fraction_of(running[:, -1], fractions).unsqueeze(1)
    block = (running <= goal).sum(dim=1, keepdim=True).clamp_(max=weights.shape[1] - 1)
    before = running.gather(1, block) - sums.gather(1, block)
    inside = weights[torch.arange(len(weights), device=weights.device), block.squeeze(1)].cumsum(dim=1)
    token = block * BLOCK + (before + inside <= goal).sum(dim=1, keepdim=True)
    return token.squeeze(1)


def fraction_of(total: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Return floor(total * fraction / 2**62), exact in int64. total: at most 2**61; fraction: at most 2**62.

    Schoolbook multiplication with digits of 31 bits.
    """
    low = 2**31 - 1
    middle = (total >> 31) * (fraction & low) + (total & low) * (fraction >> 31)
    carry = ((total & low) * (fraction & low)) >> 31
    return (total >> 31) * (fraction >> 31) + ((middle + carry) >> 31)


def _column(mask: NDArray[np.bool_], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(mask).to(like.device).unsqueeze(1)
