"""The most likely token of each row, ties to the lowest id, and its logit.

A row is cut into chunks, one program each; a second kernel merges them. The result does not depend on the cut.
"""

import torch
import triton
import triton.language as tl

from zif.contract import ChosenTokens
from zif.kernels.launch import Launcher

_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_NO_TOKEN = tl.constexpr(1 << 30)


@triton.jit
def _peak_chunks(
    logits, chunk_peaks, chunk_ids, row_stride, vocab_size, num_chunks,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * row_stride + token, mask=token < vocab_size, other=-_INFINITY).to(tl.float32)
    is_nan = values != values
    peak = tl.max(tl.where(is_nan, -_INFINITY, values), axis=0)
    place = row * num_chunks + chunk
    tl.store(chunk_ids + place, tl.min(tl.where(values == peak, token, _NO_TOKEN), axis=0))
    tl.store(chunk_peaks + place, tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, _NAN, peak))


@triton.jit
def _merge_peaks(
    chunk_peaks, chunk_ids, peaks, token_ids, num_chunks,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    values = tl.load(chunk_peaks + row * num_chunks + chunk, mask=inside, other=-_INFINITY)
    ids = tl.load(chunk_ids + row * num_chunks + chunk, mask=inside, other=_NO_TOKEN)
    is_nan = values != values
    peak = tl.max(tl.where(is_nan, -_INFINITY, values), axis=0)
    token = tl.min(tl.where(values == peak, ids, _NO_TOKEN), axis=0)
    # Only where a row is NaN does no token have the peak.
    tl.store(token_ids + row, tl.where(token == _NO_TOKEN, 0, token).to(tl.int64))
    tl.store(peaks + row, tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, _NAN, peak))


def greedy(launch: Launcher, logits: torch.Tensor) -> ChosenTokens:
    """Choose the most likely token of each row, the lowest id among equals. logits: [S, V], any float dtype."""
    num_rows, vocab_size = logits.shape
    config = launch.tuning.config("peak_chunks", vocab_size=vocab_size)
    num_chunks = triton.cdiv(vocab_size, config["CHUNK"])
    chunk_peaks = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    chunk_ids = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    arguments = (logits, chunk_peaks, chunk_ids, logits.stride(0), vocab_size, num_chunks)
    launch(_peak_chunks, (num_rows, num_chunks), arguments, config)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    config = launch.tuning.config("merge_peaks", num_chunks=num_chunks)
    merged = (chunk_peaks, chunk_ids, peaks, token_ids, num_chunks)
    launch(_merge_peaks, (num_rows,), merged, config, CHUNKS=triton.next_power_of_2(num_chunks))
    return ChosenTokens(token_ids, peaks)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in (32000, 128256, 262144):
            greedy(launch, torch.empty(64, vocab_size, dtype=dtype, device="meta"))
