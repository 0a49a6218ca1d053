"""Penalties on tokens that a request has already: over its distinct tokens, not over the vocabulary.

The lists are those of `zif.runtime.penalties`, kept on the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher


@triton.jit
def _apply_penalties(
    logits, rows, token_ids, counts, lengths, repetition, frequency, presence,
    row_stride, ids_stride, counts_stride, vocab_size,
    TOKENS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    index = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = index < tl.load(lengths + entry)
    token = tl.load(token_ids + entry * ids_stride + index, mask=inside, other=-1).to(tl.int64)
    inside = inside & (token >= 0) & (token < vocab_size)
    count = tl.load(counts + entry * counts_stride + index, mask=inside, other=0).to(tl.float32)
    place = logits + row * row_stride + token
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(repetition + entry)
    value = tl.where(value > 0, tl.math.div_rn(value, factor), value * factor)
    value = value - tl.load(frequency + entry) * count - tl.load(presence + entry) * (count > 0).to(tl.float32)
    tl.store(place, value.to(logits.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class PenaltyLists:
    """The tokens of P requests that have penalties, with how often each was generated. All on the device.

    rows: [P], integers, the request's row of logits, distinct. token_ids: [P, W], integers, distinct within a request.
    counts: [P, W], integers or floats; 0: in the prompt only. lengths: [P], integers: entries in use; what follows
    them is not read. repetition, frequency, presence: [P], float32; 1, 0 and 0 penalize nothing.
    """

    rows: torch.Tensor
    token_ids: torch.Tensor
    counts: torch.Tensor
    lengths: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


def apply_penalties(launch: Launcher, logits: torch.Tensor, lists: PenaltyLists) -> None:
    """Lower the logits of tokens that requests have, in place: repetition, then frequency and presence.

    logits: [S, V], any float dtype. A positive logit is divided by the repetition penalty, another multiplied (Keskar
    et al., "CTRL", 2019, section 4.1); frequency times count and presence where generated are subtracted. A token id
    outside the vocabulary changes nothing. Raises `ValueError` where shapes do not fit.
    """
    columns = (lists.rows, lists.lengths, lists.repetition, lists.frequency, lists.presence)
    num_lists, width = lists.token_ids.shape
    if lists.counts.shape != lists.token_ids.shape or any(column.shape != (num_lists,) for column in columns):
        shapes = [tuple(x.shape) for x in (lists.token_ids, lists.counts, *columns)]
        raise ValueError(f"penalty lists have the shapes {shapes!r}; they must be [P, W] twice, then [P]")
    config = launch.tuning.config("apply_penalties", width=width)
    arguments = (
        *(logits, lists.rows, lists.token_ids, lists.counts, lists.lengths),
        *(lists.repetition, lists.frequency, lists.presence),
        *(logits.stride(0), lists.token_ids.stride(0), lists.counts.stride(0), logits.shape[1]),
    )
    launch(_apply_penalties, (num_lists, triton.cdiv(width, config["TOKENS"])), arguments, config)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (torch.float32, torch.bfloat16):
        for ids in (torch.int32, torch.int64):
            integers = [empty(8, dtype=ids), empty(8, 2048, dtype=ids), empty(8, 2048), empty(8, dtype=ids)]
            lists = PenaltyLists(*integers, *(empty(8) for _ in range(3)))
            apply_penalties(launch, empty(64, 128256, dtype=dtype), lists)
