"""Tokens drawn from logits with the meaning of `zif.runtime.drawing`: same filters, same order, same ties.

No row is sorted. Probabilities are integers, so sums are exact in any order, and the threshold of a filter is found by
bisecting the bits of a score. A first pass leaves the best score of many small groups of tokens; the threshold over
those lets through a few tokens more than the filter itself, and these are searched in registers. Only where they are
too many does a search go over the whole row.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from zif.contract import ChosenTokens, DrawOptions
from zif.kernels.drawing import DrawingRows, SamplingColumns, draw, keep_likely, survey
from zif.kernels.greedy import greedy
from zif.kernels.launch import Launcher


@triton.jit
def _draw_fractions(
    states, positions, fractions, num_rows,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    z = tl.load(states + row, mask=inside, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row, mask=inside, other=0).to(tl.uint64)
    # SplitMix64, as zif.runtime.randomness has it.
    z += (position + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    tl.store(fractions + row, (z >> 2).to(tl.int64), mask=inside)


_DTYPES = {
    "temperature": torch.float32,
    "min_p": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "fractions": torch.int64,
}
_HOST_DTYPES = {
    "temperature": np.float32,
    "min_p": np.float32,
    "top_k": np.int64,
    "top_p": np.float64,
    "fractions": np.int64,
}


def columns_on_device(options: DrawOptions, device: torch.device) -> SamplingColumns:
    """Copy options of rows to the device, in one transfer that nobody waits for."""
    columns = [np.asarray(getattr(options, name), dtype=numpy_dtype) for name, numpy_dtype in _HOST_DTYPES.items()]
    num_rows = len(columns[0])
    # Room for a multiple of 16 bytes each: kernels are compiled for how their arguments are aligned.
    padded = -(-num_rows // 4) * 4
    packed = np.zeros(sum(padded * column.itemsize for column in columns), dtype=np.uint8)
    places = np.cumsum([0, *(padded * column.itemsize for column in columns)]).tolist()
    for place, column in zip(places, columns, strict=False):
        packed[place : place + column.nbytes] = column.view(np.uint8)
    memory = torch.from_numpy(packed).to(device, non_blocking=True)
    parts = zip(places, places[1:], _DTYPES.values(), strict=False)
    return SamplingColumns(*(memory[begin:end].view(dtype)[:num_rows] for begin, end, dtype in parts))


def draw_fractions(launch: Launcher, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one fraction per stream, the numbers of `zif.runtime.randomness.draw_fractions`.

    states: [R], int64, the bits of `stream_state`. positions: [R], int64. Returns [R], int64: numerators over 2**62.
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    fractions = torch.empty_like(positions)
    num_rows = positions.shape[0]
    config = launch.tuning.config("draw_fractions", rows=num_rows)
    grid = (triton.cdiv(num_rows, config["ROWS"]),)
    launch(_draw_fractions, grid, (states, positions, fractions, num_rows), config)
    return fractions


def sample(launch: Launcher, logits: torch.Tensor, options: SamplingColumns) -> ChosenTokens:
    """Choose one token per row: temperature, min_p, top_k, top_p, then the token at a fraction of the total.

    logits: [S, V], any float dtype, left as they are. A row gives the same token alone and in any batch, and the token
    of `zif.runtime.drawing.draw_tokens`, as far as the device's exp is that of torch: probabilities may differ in the
    last bit of a float32. Raises `ValueError` where an option's shape or dtype does not fit.
    """
    num_rows = logits.shape[0]
    for name, dtype in _DTYPES.items():
        column = getattr(options, name)
        if column.shape != (num_rows,) or column.dtype != dtype:
            raise ValueError(f"{name} is {column.dtype} {tuple(column.shape)!r}; give {dtype}, [{num_rows}]")
    chosen = greedy(launch, logits)
    rows = DrawingRows(logits, chosen, options)
    surveyed = survey(launch, rows)
    draw(launch, rows, surveyed, keep_likely(launch, rows, surveyed))
    return chosen


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype, sizes in ((torch.float32, (32000, 128256, 262144)), (torch.bfloat16, (128256,))):
        for vocab_size in sizes:
            columns = SamplingColumns(*(empty(column, 64) for column in _DTYPES.values()))
            sample(launch, empty(dtype, 64, vocab_size), columns)
    draw_fractions(launch, empty(torch.int64, 64), empty(torch.int64, 64))
