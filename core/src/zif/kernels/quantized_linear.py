"""Products with quantized weights of 8 bits: int8 and fp8, with activations quantized too (W8A8) or not (W8A16).

Sums are int32 for int8 and float32 otherwise; scales are applied to sums (to those of 128 products where blocks have
scales of their own). Whether a part multiplies eight-bit floats itself is data of its tuning: the tile NATIVE is 1
there, and elsewhere codes become float16, which holds each of them exactly, before they are multiplied.
"""

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Launcher
from zif.kernels.linear import Product, check_dtype, check_product, run_product, tile_of
from zif.kernels.quantization import (
    BLOCK,
    FORMATS,
    QuantizedRows,
    QuantizedWeight,
    decode_fp8,
    quantize_weight,
    quantize_weight_blocks,
)


@triton.jit
def _scaled_linear(
    x, weight, x_scales, weight_scales, bias, out,
    num_rows, num_columns, inner, inner_of_split, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    NATIVE: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP, DIES)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, INNER)
    start = split * inner_of_split
    # Beyond the last row or column the last one is read again: its results are not stored.
    read, kept = tl.minimum(rows, num_rows - 1).to(tl.int64), tl.minimum(columns, num_columns - 1).to(tl.int64)
    x_tile = x + read[:, None] * x_stride + (start + place)[None, :]
    weight_tile = weight + kept[None, :] * weight_stride + (start + place)[:, None]
    total = tl.full((ROWS, COLUMNS), 0, tl.int32 if FORMAT == "int8" else tl.float32)
    for at in range(start, tl.minimum(start + inner_of_split, inner), INNER):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = at + place < inner
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            right = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        if FORMAT == "int8":
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        elif NATIVE:
            # Some parts keep fewer bits than float32 while they add products up: not longer than a tile.
            total = tl.dot(left, right, total, max_num_imprecise_acc=INNER)
        else:
            total = tl.dot(decode_fp8(left, FORMAT).to(tl.float16), decode_fp8(right, FORMAT).to(tl.float16), total)
        x_tile += INNER
        weight_tile += INNER
    scales = tl.load(weight_scales + kept) if PER_CHANNEL else tl.load(weight_scales)
    scaled = total.to(tl.float32) * tl.load(x_scales + read)[:, None]
    scaled *= scales[None, :] if PER_CHANNEL else scales
    if bias is not None:
        scaled += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    to = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + to, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _block_scaled_linear(
    x, weight, x_scales, weight_scales, bias, out,
    num_rows, num_columns, inner, inner_of_split, x_stride, weight_stride, x_groups, weight_groups, x_step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    NATIVE: tl.constexpr, EVEN: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS, GROUP, DIES)
    split = tl.program_id(1)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, INNER)
    start = split * inner_of_split
    # Beyond the last row or column the last one is read again: its results are not stored.
    read, kept = tl.minimum(rows, num_rows - 1).to(tl.int64), tl.minimum(columns, num_columns - 1).to(tl.int64)
    x_tile = x + read[:, None] * x_stride + (start + place)[None, :]
    weight_tile = weight + kept[None, :] * weight_stride + (start + place)[:, None]
    total = tl.full((ROWS, COLUMNS), 0, tl.float32)
    for at in range(start, tl.minimum(start + inner_of_split, inner), INNER):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = at + place < inner
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            right = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        if NATIVE:
            product = tl.dot(left, right)
        else:
            product = tl.dot(decode_fp8(left, FORMAT).to(tl.float16), decode_fp8(right, FORMAT).to(tl.float16))
        block = at // BLOCK
        row_scales = tl.load(x_scales + read * x_groups + block * x_step)
        column_scales = tl.load(weight_scales + kept // BLOCK * weight_groups + block)
        total += product * row_scales[:, None] * column_scales[None, :]
        x_tile += INNER
        weight_tile += INNER
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    to = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_only_linear(
    x, weight, weight_scales, bias, out,
    num_rows, num_columns, inner, inner_of_split, x_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    EVEN: tl.constexpr, FORMAT: tl.constexpr, PER_CHANNEL: tl.constexpr,
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
            left, codes = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = at + place < inner
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            codes = tl.load(weight_tile, mask=inside[:, None], other=0)
        # The codes of all formats are numbers of 16-bit dtypes too.
        right = codes.to(left.dtype) if FORMAT == "int8" else decode_fp8(codes, FORMAT).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
        x_tile += INNER
        weight_tile += INNER
    if PER_CHANNEL:
        total *= tl.load(weight_scales + kept)[None, :]
    else:
        total *= tl.load(weight_scales)
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    to = (split.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


def quantized_linear(
    launch: Launcher, x: QuantizedRows, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return x @ weight.T + bias of two quantized factors of one dtype, int8 or fp8. Returns [T, O], `dtype`.

    Scales of x: [T, 1], with those of the weight [O] or [1]; or, for fp8, [T, 1] or [T, I / 128], with those of
    blocks of the weight, [O / 128, I / 128] (DeepSeek-V3, 2024). Raises `ValueError` on what does not fit.
    """
    check_product(x.values, weight.values, weight.values.shape[-1], bias)
    if x.values.dtype != weight.values.dtype or x.values.dtype not in FORMATS:
        found = f"{x.values.dtype} and {weight.values.dtype}"
        raise ValueError(f"x and weight of {found} must have one dtype of {[str(known) for known in FORMATS]}")
    if weight.scales.dim() == 2:
        return _block_scaled(launch, x, weight, bias, dtype)
    columns = _check_scales(weight)
    if x.scales.shape != (x.values.shape[0], 1):
        raise ValueError(f"scales of x, {list(x.scales.shape)}, must be [{x.values.shape[0]}, 1]: one of each row")
    stored = weight.values.dtype
    name = "int8_linear" if stored == torch.int8 else "fp8_linear"
    product = _product(launch, name, x.values, weight, bias, dtype)
    native = product.config["NATIVE"] == 1 or stored == torch.int8
    return run_product(
        launch,
        _scaled_linear,
        product,
        (*_codes(native, x.values, weight.values), x.scales, weight.scales),
        (x.values.stride(0), weight.values.stride(0)),
        FORMAT=FORMATS[stored],
        PER_CHANNEL=weight.scales.numel() == columns,
    )


def _block_scaled(
    launch: Launcher, x: QuantizedRows, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    (columns, inner), num_rows = weight.values.shape, x.values.shape[0]
    blocks = [-(-columns // BLOCK), -(-inner // BLOCK)]
    if weight.values.dtype == torch.int8 or list(weight.scales.shape) != blocks:
        given = f"{list(weight.scales.shape)} for a weight of {weight.values.dtype}"
        raise ValueError(f"scales of blocks, {given}, must be {blocks} and the weight fp8")
    if list(x.scales.shape) not in ([num_rows, 1], [num_rows, blocks[1]]):
        raise ValueError(f"scales of x, {list(x.scales.shape)}, must be {[num_rows, 1]} or {[num_rows, blocks[1]]}")
    product = _product(launch, "block_scaled_linear", x.values, weight, bias, dtype)
    assert product.config["INNER"] <= BLOCK, "a tile of the inner axis lies in one block"
    groups = x.scales.shape[1]
    return run_product(
        launch,
        _block_scaled_linear,
        product,
        (*_codes(product.config["NATIVE"] == 1, x.values, weight.values), x.scales, weight.scales),
        (x.values.stride(0), weight.values.stride(0), groups, blocks[1], int(groups > 1)),
        FORMAT=FORMATS[weight.values.dtype],
        BLOCK=BLOCK,
    )


def weight_only_linear(
    launch: Launcher, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x @ weight.T + bias, x as it is, [T, I], and the weight int8 or fp8, scaled by channel or as a whole.

    Returns [T, O], dtype of x. Raises `ValueError` on what does not fit.
    """
    check_product(x, weight.values, weight.values.shape[-1], bias)
    check_dtype(x)
    if weight.values.dtype not in FORMATS:
        raise ValueError(f"weight of {weight.values.dtype} must be one of {[str(known) for known in FORMATS]}")
    columns = _check_scales(weight)
    product = _product(launch, "weight_only_linear", x, weight, bias, x.dtype)
    operands = x, *_codes(weight.values.dtype == torch.int8, weight.values), weight.scales
    constants = {"FORMAT": FORMATS[weight.values.dtype], "PER_CHANNEL": weight.scales.numel() == columns}
    strides = x.stride(0), weight.values.stride(0)
    return run_product(launch, _weight_only_linear, product, operands, strides, **constants)


def _product(
    launch: Launcher,
    name: str,
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Product:
    (rows, inner), columns = x.shape, weight.values.shape[0]
    fnuz, element_bytes = int(weight.values.dtype == torch.float8_e4m3fnuz), x.element_size()
    sizes = {"rows": rows, "columns": columns, "inner": inner}
    config = launch.tuning.config(name, **sizes, fnuz=fnuz, element_bytes=element_bytes)
    return Product(rows, columns, inner, config, bias, dtype)


def _codes(as_numbers: bool, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the arrays, or their codes for a part whose compiler does not have their dtype."""
    return values if as_numbers else tuple(array.view(torch.uint8) for array in values)


def _check_scales(weight: QuantizedWeight) -> int:
    columns = weight.values.shape[0]
    if list(weight.scales.shape) not in ([columns], [1]):
        raise ValueError(f"scales of the weight, {list(weight.scales.shape)}, must be [{columns}] or [1]")
    return columns


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for rows, (columns, inner) in ((8, (4096, 4096)), (2048, (6144, 4096)), (2048, (5120, 2880))):
        x = torch.empty(rows, inner, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(columns, inner, dtype=torch.bfloat16, device="meta")
        for stored in FORMATS:
            factor = quantize_weight(weight, stored)
            given = QuantizedRows(x.to(stored), x.new_empty(rows, 1, dtype=torch.float32))
            quantized_linear(launch, given, factor, None, x.dtype)
            if stored in (torch.int8, torch.float8_e4m3fn):
                weight_only_linear(launch, x, factor, None)
        groups = QuantizedRows(x.to(torch.float8_e4m3fn), x.new_empty(rows, -(-inner // BLOCK), dtype=torch.float32))
        quantized_linear(launch, groups, quantize_weight_blocks(weight, torch.float8_e4m3fn), None, x.dtype)
