"""Gated activations: one pass over the rows of a fused gate and up projection, in float32."""

import torch
import triton
import triton.language as tl

from zif.contract import Activation
from zif.kernels.launch import Launcher
from zif.reference.ops import SWIGLU_ALPHA, SWIGLU_LIMIT

_ALPHA = tl.constexpr(SWIGLU_ALPHA)
_LIMIT = tl.constexpr(SWIGLU_LIMIT)
_SQRT_HALF = tl.constexpr(0.5**0.5)
_TANH_SCALE = tl.constexpr(-2.0 * (2.0 / 3.141592653589793) ** 0.5)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_activation(
    gate_up, out, num_rows, row_stride, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    place = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < num_rows) & (place < columns)
    source = gate_up + row * row_stride + place
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        value = gate / (1.0 + tl.exp(-gate)) * up
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * _SQRT_HALF)) * up
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is the logistic function of 2u; the scale is -2.
        value = gate / (1.0 + tl.exp((gate + gate * gate * gate * _TANH_CUBIC) * _TANH_SCALE)) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_clamped")
        # Not minimum and maximum: those lose a NaN.
        gate = tl.where(gate > _LIMIT, _LIMIT, gate)
        up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
        value = (up + 1.0) * gate / (1.0 + tl.exp(-gate * _ALPHA))
    tl.store(out + row * columns + place, value.to(out.dtype.element_ty), mask=inside)


def gated_activation(launch: Launcher, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Implement `OpTable.gated_activation`. Raises `ValueError` where the last axis is odd."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]!r} columns; gate and up must be of one width")
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, gate_up.shape[-1])
    num_rows, columns = rows.shape[0], rows.shape[1] // 2
    out = torch.empty(*gate_up.shape[:-1], columns, dtype=gate_up.dtype, device=gate_up.device)
    config = launch.tuning.config("gated_activation", rows=num_rows, columns=columns)
    grid = (triton.cdiv(num_rows, config["ROWS"]), triton.cdiv(columns, config["COLUMNS"]))
    arguments = (rows, out, num_rows, rows.stride(0), columns)
    launch(_gated_activation, grid, arguments, config, ACTIVATION=Activation(activation).value)
    return out


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for dtype in (torch.bfloat16, torch.float16):
        for activation in Activation:
            gate_up = torch.empty(64, 2 * 14336, dtype=dtype, device="meta")
            gated_activation(launch, gate_up, activation)
    gated_activation(launch, torch.empty(64, 2 * 768, dtype=torch.bfloat16, device="meta"), Activation.SILU)
