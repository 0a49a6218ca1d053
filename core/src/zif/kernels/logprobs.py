"""Log-probability and rank of one token per row, in one pass over the vocabulary.

A row is cut into chunks of a size that depends on nothing but the tuning, one program each; a second kernel merges
them in order. So a row gives the same numbers alone and in any batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _score_chunks(
    logits, token_ids, peaks, sums, above, row_stride, vocab_size, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=-_INFINITY).to(tl.float32)
    own = tl.load(logits + row * row_stride + tl.load(token_ids + row)).to(tl.float32)
    peak = tl.max(values, axis=0)
    # Chunks of -inf alone: their difference to the peak would be NaN. A NaN goes through the sum.
    total = tl.sum(tl.exp(values - tl.where(tl.abs(peak) == _INFINITY, 0.0, peak)), axis=0)
    place = row * num_chunks + chunk
    tl.store(peaks + place, peak)
    tl.store(sums + place, total)
    tl.store(above + place, tl.sum((values > own).to(tl.int32), axis=0))


@triton.jit
def _merge_scores(
    logits, token_ids, peaks, sums, above, logprobs, ranks, normalizers, row_stride, num_chunks,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    place = row * num_chunks + chunk
    own = tl.load(logits + row * row_stride + tl.load(token_ids + row)).to(tl.float32)
    peak_of = tl.load(peaks + place, mask=inside, other=-_INFINITY)
    sum_of = tl.load(sums + place, mask=inside, other=0.0)
    peak = tl.max(peak_of, axis=0)
    peak = tl.where(tl.abs(peak) == _INFINITY, 0.0, peak)
    # A sum was taken over the distance to 0 where its peak is infinite.
    share = tl.exp(tl.where(tl.abs(peak_of) == _INFINITY, 0.0, peak_of) - peak)
    # exp(inf - peak) may have met a factor of 0, and 0 * 0 stands for chunks of -inf.
    total = tl.sum(tl.where((sum_of == 0.0) | (sum_of == _INFINITY), sum_of, sum_of * share), axis=0)
    normalizer = tl.log(total) + peak
    tl.store(normalizers + row, normalizer)
    tl.store(logprobs + row, own - normalizer)
    tl.store(ranks + row, tl.sum(tl.load(above + place, mask=inside, other=0), axis=0).to(tl.int64) + 1)


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """logprobs: [R], float32. ranks: [R], int64, one plus the number of likelier tokens. normalizers: [R], float32.

    A row's normalizer is the log of the sum of exponentials: a logit minus it is a log-probability.
    """

    logprobs: torch.Tensor
    ranks: torch.Tensor
    normalizers: torch.Tensor


def logprobs(launch: Launcher, logits: torch.Tensor, token_ids: torch.Tensor) -> ScoredTokens:
    """Score one token per row. logits: [R, V], any float dtype. token_ids: [R], integers from 0 to V - 1.

    A row with a NaN or with an infinite peak has NaN, as torch has. Raises `ValueError` where shapes do not fit.
    """
    num_rows, vocab_size = logits.shape
    if token_ids.shape != (num_rows,):
        raise ValueError(f"token_ids of {tuple(token_ids.shape)!r} must be one per row of logits, [{num_rows}]")
    config = launch.tuning.config("score_chunks", vocab_size=vocab_size)
    num_chunks = triton.cdiv(vocab_size, config["CHUNK"])

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    parts = (*(empty(num_rows, num_chunks) for _ in range(2)), empty(num_rows, num_chunks, dtype=torch.int32))
    scored = ScoredTokens(empty(num_rows), empty(num_rows, dtype=torch.int64), empty(num_rows))
    stride = logits.stride(0)
    launch(_score_chunks, (num_rows, num_chunks), (logits, token_ids, *parts, stride, vocab_size, num_chunks), config)
    results = (scored.logprobs, scored.ranks, scored.normalizers)
    config = launch.tuning.config("merge_scores", num_chunks=num_chunks)
    arguments = (logits, token_ids, *parts, *results, stride, num_chunks)
    launch(_merge_scores, (num_rows,), arguments, config, CHUNKS=triton.next_power_of_2(num_chunks))
    return scored


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in (32000, 128256, 262144):
            logits = torch.empty(64, vocab_size, dtype=dtype, device="meta")
            logprobs(launch, logits, torch.empty(64, dtype=torch.int64, device="meta"))
