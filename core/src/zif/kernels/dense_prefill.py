"""Whole prompts through the array library's own fused attention, where that is faster than reading a paged cache.

A prompt that begins at its first token finds all its keys and values in the arrays of the step. What the library does
not know keeps to the paged kernel: windows, soft caps, sinks, and prompts that go on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from zif.contract import AttentionBatch, AttentionParams
from zif.kernels.launch import Launcher

_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `first` to `last` - 1 of the step: `count` adjacent whole prompts of equal length."""

    first: int
    last: int
    count: int


def dense_spans(launch: Launcher, batch: AttentionBatch) -> tuple[Span, ...]:
    """Return the whole prompts of a step that are long enough by the tuning; neighbours of equal length go together."""
    shortest = launch.tuning.config("dense_prefill")["MIN_QUERIES"]
    lengths = np.diff(batch.query_start)
    if not shortest or batch.window is not None or not len(lengths) or int(lengths.max()) < shortest:
        return ()
    whole = (lengths == batch.seq_lens) & (lengths >= shortest)
    spans: list[Span] = []
    for request in np.flatnonzero(whole).tolist():
        first, length = int(batch.query_start[request]), int(lengths[request])
        before = spans[-1] if spans else None
        if before and before.last == first and before.last - before.first == before.count * length:
            spans[-1] = Span(before.first, first + length, before.count + 1)
        else:
            spans.append(Span(first, first + length, 1))
    return tuple(spans)


def serves(query: torch.Tensor, params: AttentionParams) -> bool:
    """Say whether the library's attention means the same for this layer, and has a fused kernel for its heads.

    Without one it would hold all scores at once.
    """
    plain = params.window is None and params.softcap is None and params.sinks is None
    return plain and query.element_size() == 2 and query.shape[-1] <= _MAX_HEAD_DIM


def attend_dense(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], spans: tuple[Span, ...], scale: float, out: torch.Tensor
) -> None:
    """Attend from the rows of the spans. heads: query [T, H, D], key and value [T, K, D].

    Mutates the spans' rows of out, [T, H, D].
    """
    for span in spans:
        query, key, value = (x[span.first : span.last].unflatten(0, (span.count, -1)).transpose(1, 2) for x in heads)
        grouped = query.shape[1] != key.shape[1]
        found = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        out[span.first : span.last] = found.transpose(1, 2).flatten(0, 1)
