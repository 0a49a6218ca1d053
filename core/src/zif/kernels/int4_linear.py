"""Products with weights of 4 bits in groups (W4A16): codes become numbers of x's dtype in registers, group by group.

The numbers are those of `Int4Weight.dequantized`, so the product is the one with the dequantized weight.
"""

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher
from zif.kernels.linear import Product, check_dtype, check_product, run_product, tile_of
from zif.kernels.quantization import Int4Weight, quantize_weight_int4


@triton.jit
def _int4_linear(
    x, packed, scales, zeros, bias, out,
    num_rows, num_columns, num_bytes, bytes_of_split, x_stride, packed_stride, num_groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    EVEN: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP, DIES)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # A tile has INNER bytes: of one group, or all those of several.
    GROUPS: tl.constexpr = INNER // HALF if INNER > HALF else 1
    BYTES: tl.constexpr = INNER // GROUPS
    group = tl.arange(0, GROUPS)
    place = tl.arange(0, INNER)
    # Where the lower codes of these bytes are in a row of x. The upper ones come half a group later.
    lower = place // HALF * (2 * HALF) + place % HALF
    # Beyond the last row or column the last one is read again: its results are not stored.
    kept = tl.minimum(columns, num_columns - 1).to(tl.int64)
    x_row = x + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * x_stride
    packed_tile = packed + kept[:, None] * packed_stride + place[None, :]
    total = tl.full((ROWS, COLUMNS), 0, tl.float32)
    start = split * bytes_of_split
    for at in range(start, tl.minimum(start + bytes_of_split, num_bytes), INNER):
        first = at // HALF * (2 * HALF) + at % HALF
        if EVEN:
            codes = tl.load(packed_tile + at)
            low, high = tl.load(x_row + first + lower[None, :]), tl.load(x_row + first + HALF + lower[None, :])
            scale = tl.load(scales + kept[:, None] * num_groups + at // HALF + group[None, :])
        else:
            inside = (at + place < num_bytes)[None, :]
            codes = tl.load(packed_tile + at, mask=inside, other=0)
            low = tl.load(x_row + first + lower[None, :], mask=inside, other=0.0)
            high = tl.load(x_row + first + HALF + lower[None, :], mask=inside, other=0.0)
            known = (at // HALF + group < num_groups)[None, :]
            scale = tl.load(scales + kept[:, None] * num_groups + at // HALF + group[None, :], mask=known, other=0.0)
        zero = tl.full((COLUMNS, GROUPS), 8, tl.uint8)
        if zeros is not None:
            known = (at // HALF + group < num_groups)[None, :]
            zero = tl.load(zeros + kept[:, None] * num_groups + at // HALF + group[None, :], mask=known, other=0)
        codes = tl.reshape(codes, (COLUMNS, GROUPS, BYTES)).to(tl.int8, bitcast=True)
        zero, scale = zero.to(tl.int8, bitcast=True)[:, :, None], scale.to(tl.float32)[:, :, None]
        even = (((codes & 15) - zero).to(tl.float32) * scale).to(low.dtype)
        odd = ((((codes >> 4) & 15) - zero).to(tl.float32) * scale).to(low.dtype)
        total = tl.dot(low, tl.trans(tl.reshape(even, (COLUMNS, INNER))), total, input_precision="ieee")
        total = tl.dot(high, tl.trans(tl.reshape(odd, (COLUMNS, INNER))), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    to = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


def int4_linear(launch: Launcher, x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias. x: [T, I], bfloat16, float16 or float32. Returns [T, O], dtype of x.

    Raises `ValueError` on what does not fit.
    """
    num_rows, inner = x.shape
    check_product(x, weight.packed, 2 * weight.packed.shape[-1], bias)
    check_dtype(x)
    columns, size = weight.packed.shape[0], weight.group_size
    if size not in (32, 64, 128) or inner % size:
        raise ValueError(f"group_size {size} must be 32, 64 or 128 and divide the rows of {inner}")
    expected = [columns, inner // size]
    for name, array in (("scales", weight.scales), ("zeros", weight.zeros)):
        if array is not None and (list(array.shape) != expected or not array.is_contiguous()):
            raise ValueError(f"{name} of shape {list(array.shape)} must be {expected} and dense")
    sizes = {"rows": num_rows, "columns": columns, "inner": inner, "element_bytes": x.element_size()}
    config = launch.tuning.config("int4_linear", **sizes, group_size=size)
    product = Product(num_rows, columns, inner // 2, config, bias, x.dtype)
    operands = x, weight.packed, weight.scales, weight.zeros
    strides = x.stride(0), weight.packed.stride(0), inner // size
    return run_product(launch, _int4_linear, product, operands, strides, HALF=size // 2)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for rows, (columns, inner) in ((8, (4096, 4096)), (2048, (6144, 4096)), (2048, (5120, 2880))):
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.empty(rows, inner, dtype=dtype, device="meta")
            weight = torch.empty(columns, inner, dtype=dtype, device="meta")
            int4_linear(launch, x, quantize_weight_int4(weight, 32), None)
            if inner % 128 == 0:
                int4_linear(launch, x, quantize_weight_int4(weight, 128), None)
                int4_linear(launch, x, quantize_weight_int4(weight, 64, symmetric=False), None)
