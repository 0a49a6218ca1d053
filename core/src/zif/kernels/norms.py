"""RMS norm, alone and fused with the addition before it: one program a row, the row in registers."""

import torch
import triton
import triton.language as tl

from zif.contract import NormOutput
from zif.kernels.launch import Launcher


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x, residual, weight, normed, total, num_rows, x_stride, residual_stride, columns, eps, weight_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    place = tl.arange(0, COLUMNS)[None, :]
    inside = (row < num_rows) & (place < columns)
    values = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    if ADDS:
        # The sum is rounded to the model's dtype, as the residual stream is.
        added = tl.load(residual + row * residual_stride + place, mask=inside, other=0.0)
        values = (added.to(tl.float32) + values.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * columns + place, values, mask=inside)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / columns + eps)[:, None]
    scale = tl.load(weight + place, mask=place < columns, other=0.0).to(tl.float32) + weight_offset
    tl.store(normed + row * columns + place, (wide * inverse * scale).to(normed.dtype.element_ty), mask=inside)


def rms_norm(launch: Launcher, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    """Implement `OpTable.rms_norm`. Raises `ValueError` on a weight of another size."""
    _check(x, weight)
    rows = _rows(x)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, columns = rows.shape
    config = launch.tuning.config("rms_norm", columns=columns)
    arguments = (
        rows,
        None,
        weight,
        normed,
        None,
        num_rows,
        rows.stride(0),
        0,
        columns,
        float(eps),
        float(weight_offset),
    )
    grid = (triton.cdiv(num_rows, config["ROWS"]),)
    launch(_rms_norm, grid, arguments, config, COLUMNS=triton.next_power_of_2(columns), ADDS=False)
    return normed


def add_rms_norm(
    launch: Launcher, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> NormOutput:
    """Implement `OpTable.add_rms_norm`. Raises `ValueError` on shapes that do not fit."""
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, and x {tuple(x.shape)}; they must be alike")
    rows, added = _rows(x), _rows(residual)
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    num_rows, columns = rows.shape
    config = launch.tuning.config("rms_norm", columns=columns)
    sizes = num_rows, rows.stride(0), added.stride(0), columns
    arguments = (rows, added, weight, normed, total, *sizes, float(eps), float(weight_offset))
    grid = (triton.cdiv(num_rows, config["ROWS"]),)
    launch(_rms_norm, grid, arguments, config, COLUMNS=triton.next_power_of_2(columns), ADDS=True)
    return NormOutput(normed, total)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for dtype in (torch.bfloat16, torch.float16):
        for columns in (128, 4096, 8192):
            x = torch.empty(64, columns, dtype=dtype, device="meta")
            weight = torch.empty(columns, dtype=dtype, device="meta")
            rms_norm(launch, x, weight, 1e-5, 0.0)
            add_rms_norm(launch, x, x, weight, 1e-5, 0.0)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, and the rows of x have {x.shape[-1]} elements")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View x as rows whose elements are adjacent."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
