"""Products with a weight, y = x @ weight.T + bias: how tiles are ordered, how a long sum is divided, the plain product.

A long sum over few rows (decode) is divided into splits, so that the whole device reads the weight. Each split writes
its float32 sum to a workspace, and a second kernel adds them in their order: no atomics, the same bits every time.
`zif.kernels.quantized_linear` and `zif.kernels.int4_linear` divide their products the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Argument, Launcher
from zif.kernels.tuning import LaunchConfig


@triton.jit
def tile_of(
    program, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return the row tile and the column tile of a program.

    Programs that run at the same time share what they read: GROUP row tiles go through the columns together. Where
    programs are dealt to dies in turn and every die has a cache of its own, each gets a run of adjacent tiles.
    """
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(num_columns, COLUMNS)
    if DIES > 1:
        tiles = row_tiles * column_tiles
        die = program % DIES
        program = die * (tiles // DIES) + tl.minimum(die, tiles % DIES) + program // DIES
    tiles_of_group = GROUP * column_tiles
    first = program // tiles_of_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    place = program % tiles_of_group
    return first + place % height, place // height


@triton.jit
def _linear(
    x, weight, bias, out, num_rows, num_columns, inner, inner_of_split, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP, DIES)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, INNER)
    start = split * inner_of_split
    # Beyond the last row or column the last one is read again: its results are not stored.
    x_tile = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride + (start + place)[None, :]
    kept = tl.minimum(columns, num_columns - 1).to(tl.int64)
    weight_tile = weight + kept[None, :] * weight_stride + (start + place)[:, None]
    total = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for at in range(start, tl.minimum(start + inner_of_split, inner), INNER):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = at + place < inner
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            right = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        x_tile += INNER
        weight_tile += INNER
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    to = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _merge_splits(
    partial, bias, out, num_elements, num_columns, num_splits, ELEMENTS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < num_elements
    total = tl.load(partial + place, mask=inside, other=0.0)
    for split in range(1, num_splits):
        total += tl.load(partial + split * num_elements + place, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + place % num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Product:
    """The sizes of [rows, inner] times [columns, inner], its configuration, and what becomes of the sums.

    The tiles of `config` are ROWS, COLUMNS and INNER, their order GROUP and DIES, and the number of SPLITS.
    """

    rows: int
    columns: int
    inner: int
    config: LaunchConfig
    bias: torch.Tensor | None
    dtype: torch.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of tiles and of splits."""
        config = self.config
        return triton.cdiv(self.rows, config["ROWS"]) * triton.cdiv(self.columns, config["COLUMNS"]), config["SPLITS"]

    @property
    def inner_of_split(self) -> int:
        """Return how much of the inner axis a split sums: whole tiles, so a late split may have none."""
        tiles = triton.cdiv(self.inner, self.config["INNER"])
        return int(triton.cdiv(tiles, self.config["SPLITS"]) * self.config["INNER"])


def run_product(
    launch: Launcher,
    kernel: Any,
    product: Product,
    operands: Sequence[torch.Tensor | None],
    strides: Sequence[int],
    **constants: Any,
) -> torch.Tensor:
    """Run a product's kernel and add its splits up. Returns [rows, columns], `product.dtype`.

    The kernel's arguments are `operands` (the first is on the device of the result), bias, result, the four sizes of
    the product, `strides`.
    """
    rows, columns, splits = product.rows, product.columns, product.config["SPLITS"]
    first = operands[0]
    assert first is not None, "a product has operands"
    out = torch.empty(rows, columns, dtype=product.dtype, device=first.device)
    sizes = rows, columns, product.inner, product.inner_of_split
    even = product.inner % product.config["INNER"] == 0
    if splits == 1:
        arguments: tuple[Argument, ...] = (*operands, product.bias, out, *sizes, *strides)
        launch(kernel, product.grid, arguments, product.config, EVEN=even, **constants)
        return out
    partial = torch.empty(splits, rows, columns, dtype=torch.float32, device=first.device)
    launch(kernel, product.grid, (*operands, None, partial, *sizes, *strides), product.config, EVEN=even, **constants)
    config = launch.tuning.config("merge_splits")
    merged = (partial, product.bias, out, rows * columns, columns, splits)
    launch(_merge_splits, (triton.cdiv(rows * columns, config["ELEMENTS"]),), merged, config)
    return out


def linear(
    launch: Launcher,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Implement `OpTable.linear` for bfloat16, float16 and float32. x: [..., I]. weight: [O, I]. Returns [..., O].

    A row's result never depends on what the other rows hold. With `batch_invariant` it does not depend on their number
    either: tiles and the order of sums are those of the weight's shape alone, at some cost for few rows.
    Raises `ValueError` on shapes or dtypes that do not fit.
    """
    check_product(x, weight, weight.shape[-1], bias)
    check_dtype(x)
    if weight.dtype != x.dtype:
        raise ValueError(f"weight of {weight.dtype} must have the dtype of x, {x.dtype}; convert it")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    num_rows, inner = rows.shape
    columns = weight.shape[0]
    config = launch.tuning.config(
        "linear",
        rows=0 if batch_invariant else num_rows,
        columns=columns,
        inner=inner,
        remainder=inner % 128,
        element_bytes=x.element_size(),
    )
    product = Product(num_rows, columns, inner, config, bias, x.dtype)
    strides = rows.stride(0), weight.stride(0)
    return run_product(launch, _linear, product, (rows, weight), strides).view(*x.shape[:-1], columns)


def check_dtype(x: torch.Tensor) -> None:
    """Raise `ValueError` where the kernels do not compute with the dtype of x."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x of {x.dtype} must be of bfloat16, float16 or float32; convert it")


def check_product(x: torch.Tensor, weight: torch.Tensor, inner: int, bias: torch.Tensor | None) -> None:
    """Raise `ValueError` where x [..., inner], weight [O, ...] and bias [O] do not fit or are not dense."""
    if weight.dim() != 2 or x.shape[-1] != inner:
        raise ValueError(f"x of shape {list(x.shape)} and weight of {list(weight.shape)}: inner sizes must be equal")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias of shape {list(bias.shape)} must be [{weight.shape[0]}], one of each column")
    for name, array in (("x", x), ("weight", weight)):
        if array.shape[-1] > 1 and array.stride(-1) != 1:
            raise ValueError(f"{name} has stride {array.stride(-1)} in its last axis, which must be dense (1)")


_LAYERS = ((6144, 4096), (4096, 14336), (128256, 4096), (5120, 2880))
"""Columns and inner size: fused heads, the second product of a feed-forward, the vocabulary, a width of 45 * 64."""


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for rows in (1, 32, 64, 2048):
        for columns, inner in _LAYERS:
            x = torch.empty(rows, inner, dtype=torch.bfloat16, device="meta")
            weight = torch.empty(columns, inner, dtype=torch.bfloat16, device="meta")
            linear(launch, x, weight, None)
    for dtype in (torch.float16, torch.float32):
        for rows in (8, 512):
            x = torch.empty(rows, 4096, dtype=dtype, device="meta")
            linear(launch, x, x.new_empty(4096, 4096), x.new_empty(4096))
    x = torch.empty(8, 4096, dtype=torch.bfloat16, device="meta")
    linear(launch, x, x.new_empty(4096, 4096), x.new_empty(4096), batch_invariant=True)
