"""The gated delta rule, as Qwen3-Next's linear attention has it (Yang, Kautz and Hatamizadeh, 2024, arXiv:2412.06464).

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t^T exp(g_t) S_{t-1})        o_t = scale * q_t S_t

Equation 10 of the paper, with S transposed to [K, V] as models keep it and the decay as its logarithm g <= 0. Here is
the step of one token per request; packed prompts are in `zif.kernels.delta_rule_chunk`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Argument, Launcher
from zif.kernels.state_slots import StateSlots, check_rows, check_state

NORM_EPS = 1e-6
"""What is added to the sum of squares where q and k are normalized."""


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """q, k: [T, Hk, K], v: [T, H, V], model dtype; g, beta: [T, H]. Value head h is served by key head h // (H / Hk).

    `normalize`: q and k are divided by their length, sqrt(sum of squares + 1e-6). First axes may be strided.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    scale: float
    normalize: bool = True

    def strides(self) -> list[int]:
        """Return the strides of first axes."""
        return [rows.stride(0) for rows in (self.q, self.k, self.v, self.g, self.beta)]

    def check(self, state: torch.Tensor, slots: StateSlots, num_requests: int) -> None:
        """Raise `ValueError` unless the arrays fit each other and the state [num_slots, H, K, V]."""
        if self.k.dim() != 3 or self.v.dim() != 3:
            shapes = tuple(self.k.shape), tuple(self.v.shape)
            raise ValueError(f"k and v of shapes {shapes} must be [T, Hk, K] and [T, H, V]")
        (num_tokens, key_heads, key_dim), (_, heads, value_dim) = self.k.shape, self.v.shape
        if heads % key_heads:
            raise ValueError(f"{heads} value heads cannot share {key_heads} key heads evenly; choose a divisor")
        check_rows("q", self.q, (num_tokens, key_heads, key_dim))
        check_rows("k", self.k, (num_tokens, key_heads, key_dim))
        check_rows("v", self.v, (num_tokens, heads, value_dim))
        check_rows("g", self.g, (num_tokens, heads))
        check_rows("beta", self.beta, (num_tokens, heads))
        check_state("delta rule", state, (heads, key_dim, value_dim), slots, num_requests)

    def constants(self) -> dict[str, int | bool]:
        """Return the kernels' constants that follow from shapes."""
        (_, key_heads, key), (_, heads, value) = self.k.shape, self.v.shape
        sizes: dict[str, int | bool] = {"HEADS": heads, "KEY_HEADS": key_heads, "KEY": key, "VALUE": value}
        return {**sizes, "KEY_PAD": max(16, triton.next_power_of_2(key)), "NORMALIZE": self.normalize}


@triton.jit
def _delta_step(
    q, k, v, g, beta, state, out, read, write,
    q_stride, k_stride, v_stride, g_stride, beta_stride, state_stride, scale, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, KEY_PAD: tl.constexpr,
    NORMALIZE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    key_head = head // (HEADS // KEY_HEADS)
    row = tl.arange(0, KEY_PAD)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    query = tl.load(q + request * q_stride + key_head * KEY + row, mask=row < KEY, other=0.0).to(tl.float32)
    key = tl.load(k + request * k_stride + key_head * KEY + row, mask=row < KEY, other=0.0).to(tl.float32)
    if NORMALIZE:
        query *= tl.rsqrt(tl.sum(query * query, axis=0) + eps)
        key *= tl.rsqrt(tl.sum(key * key, axis=0) + eps)
    value = tl.load(v + request * v_stride + head * VALUE + column, mask=column < VALUE, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(g + request * g_stride + head).to(tl.float32))
    rate = tl.load(beta + request * beta_stride + head).to(tl.float32)

    cell = (head * KEY + row)[:, None] * VALUE + column[None, :]
    here = (row < KEY)[:, None] & (column < VALUE)[None, :]
    held = here & (row < tl.where(source < 0, 0, KEY))[:, None]
    carried = tl.load(state + source * state_stride + cell, mask=held, other=0.0).to(tl.float32) * decay
    change = rate * (value - tl.sum(carried * key[:, None], axis=0))
    carried += key[:, None] * change[None, :]
    kept = here & (row < tl.where(target < 0, 0, KEY))[:, None]
    tl.store(state + target * state_stride + cell, carried.to(state.dtype.element_ty), mask=kept)
    result = tl.sum(carried * query[:, None], axis=0) * scale
    to = out + (request * HEADS + head) * VALUE + column
    tl.store(to, result.to(out.dtype.element_ty), mask=column < VALUE)


def delta_rule_step(launch: Launcher, inputs: DeltaInputs, state: torch.Tensor, slots: StateSlots) -> torch.Tensor:
    """Advance each request by one token (T = R), the states in place. state: [num_slots, H, K, V], float32.

    Returns [R, H, V], dtype of v. Sums are float32. Raises `ValueError`.
    """
    inputs.check(state, slots, inputs.v.shape[0])
    num_requests, heads, dim = inputs.v.shape
    out = torch.empty(inputs.v.shape, dtype=inputs.v.dtype, device=inputs.v.device)
    config = launch.tuning.config("delta_step", key=state.shape[2], value=dim)
    arrays = (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, state, out, slots.read, slots.write)
    arguments: list[Argument] = [*arrays, *inputs.strides(), state.stride(0), float(inputs.scale), NORM_EPS]
    grid = (heads, triton.cdiv(dim, config["VALUES"]), num_requests)
    launch(_delta_step, grid, arguments, config, **inputs.constants())
    return out


def representative(launch: Launcher) -> None:
    """Start the kernel as models do: Qwen3-Next, 16 key heads and 32 value heads of 128."""
    for dtype in (torch.bfloat16, torch.float16):
        inputs, state, indices = example(dtype, num_tokens=64)
        delta_rule_step(launch, inputs, state, StateSlots(indices, indices))


def example(dtype: torch.dtype, num_tokens: int) -> tuple[DeltaInputs, torch.Tensor, torch.Tensor]:
    """Return inputs, states and slots of Qwen3-Next on the device "meta"."""
    q = torch.empty(num_tokens, 16, 128, dtype=dtype, device="meta")
    v = torch.empty(num_tokens, 32, 128, dtype=dtype, device="meta")
    g = torch.empty(num_tokens, 32, dtype=torch.float32, device="meta")
    state = torch.empty(64, 32, 128, 128, dtype=torch.float32, device="meta")
    beta = torch.empty(num_tokens, 32, dtype=dtype, device="meta")
    indices = torch.empty(64, dtype=torch.int32, device="meta")
    return DeltaInputs(q, q, v, g, beta, 0.1), state, indices
