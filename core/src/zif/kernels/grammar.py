"""Masks over the vocabulary: tokens that a grammar does not allow get the logit -inf."""

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher

_WORD_BITS = 32
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _apply_bitmask(
    logits, mask, rows, row_stride, mask_stride, vocab_size,
    WORDS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    row = entry
    if rows is not None:
        row = tl.load(rows + entry).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    words = tl.load(mask + entry * mask_stride + word, mask=word * 32 < vocab_size, other=0)
    token = word[:, None] * 32 + bit[None, :]
    inside = token < vocab_size
    place = logits + row * row_stride + token
    # Read, and not only written where forbidden: whole vectors move faster than single elements.
    values = tl.load(place, mask=inside, other=0.0)
    allowed = ((words[:, None] >> bit[None, :]) & 1) != 0
    tl.store(place, tl.where(allowed, values.to(tl.float32), -_INFINITY).to(values.dtype), mask=inside)


def apply_bitmask(launch: Launcher, logits: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Set the logits of forbidden tokens to -inf, in place.

    logits: [S, V], any float dtype. mask: [R, at least ceil(V / 32)], int32: bit v % 32 of word v // 32 says that token
    v is allowed. rows: [R], integers, the distinct row of logits for each row of the mask; None: row i. Raises
    `ValueError`.
    """
    num_masks, vocab_size = mask.shape[0], logits.shape[1]
    num_words = triton.cdiv(vocab_size, _WORD_BITS)
    if mask.dtype != torch.int32 or mask.dim() != 2 or mask.shape[1] < num_words:
        found = mask.dtype, tuple(mask.shape)
        raise ValueError(f"a mask of {found!r} does not serve {vocab_size} tokens; give int32, [R, {num_words}]")
    if (rows is None and num_masks != logits.shape[0]) or (rows is not None and rows.shape != (num_masks,)):
        raise ValueError(f"{num_masks!r} masks for {logits.shape[0]} rows of logits; name one row for each mask")
    config = launch.tuning.config("apply_bitmask", vocab_size=vocab_size)
    grid = (num_masks, triton.cdiv(num_words, config["WORDS"]))
    launch(_apply_bitmask, grid, (logits, mask, rows, logits.stride(0), mask.stride(0), vocab_size), config)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in (128256, 151936):
            logits = torch.empty(64, vocab_size, dtype=dtype, device="meta")
            mask = torch.empty(64, vocab_size // _WORD_BITS, dtype=torch.int32, device="meta")
            apply_bitmask(launch, logits, mask)
            apply_bitmask(launch, logits, mask[:8], torch.empty(8, dtype=torch.int64, device="meta"))
