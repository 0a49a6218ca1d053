"""Selective state spaces with one decay per head, as Mamba-2 has them (Dao and Gu, 2024, arXiv:2405.21060).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        y_t = S_t C_t + D x_t, times silu(z_t) where there is a gate

Per head, A and D are numbers, S is [P, N], and dt_t is softplus(dt + bias), clamped, as the model says. The chunked
form multiplies matrices inside chunks of tokens and carries S, float32, from chunk to chunk (the paper's section 6);
one program walks along a request. A NaN input spoils its chunk and what follows in its request, no other request.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.kernels.launch import Argument, Launcher
from zif.kernels.state_slots import StateSlots, check_rows, check_state


@dataclass(frozen=True, slots=True)
class StateSpace:
    """What a layer has learned, all [H]: a (negative), skip (the paper's D), dt_bias; and how it reads dt."""

    a: torch.Tensor
    skip: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    dt_softplus: bool = True
    dt_min: float = 0.0
    dt_max: float = math.inf


@dataclass(frozen=True, slots=True)
class StateSpaceInputs:
    """x, gate: [T, H, P]. dt: [T, H]. b, c: [T, G, N], model dtype; head h belongs to group h // (H / G).

    First axes may be strided.
    """

    x: torch.Tensor
    dt: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    gate: torch.Tensor | None = None


@triton.jit
def _state_space_step(
    x, dt, b, c, gate, a, skip, dt_bias, state, out, read, write,
    x_stride, dt_stride, b_stride, c_stride, gate_stride, state_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, STATE_PAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    column = tl.arange(0, STATE_PAD)
    inside = row < DIM
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    step = tl.load(dt + request * dt_stride + head).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    step = tl.where(step < dt_min, dt_min, tl.where(step > dt_max, dt_max, step))
    decay = tl.exp(step * tl.load(a + head).to(tl.float32))

    group = head // (HEADS // GROUPS) * STATE
    known = column < STATE
    into = tl.load(b + request * b_stride + group + column, mask=known, other=0.0).to(tl.float32)
    out_of = tl.load(c + request * c_stride + group + column, mask=known, other=0.0).to(tl.float32)
    value = tl.load(x + request * x_stride + head * DIM + row, mask=inside, other=0.0).to(tl.float32)

    cell = (head * DIM + row)[:, None] * STATE + column[None, :]
    here = inside[:, None] & (column[None, :] < STATE)
    held = here & (column[None, :] < tl.where(source < 0, 0, STATE))
    old = tl.load(state + source * state_stride + cell, mask=held, other=0.0).to(tl.float32)
    new = old * decay + (value * step)[:, None] * into[None, :]
    kept = here & (column[None, :] < tl.where(target < 0, 0, STATE))
    tl.store(state + target * state_stride + cell, new.to(state.dtype.element_ty), mask=kept)

    y = tl.sum(new * out_of[None, :], axis=1)
    if HAS_SKIP:
        y += value * tl.load(skip + head).to(tl.float32)
    if HAS_GATE:
        z = tl.load(gate + request * gate_stride + head * DIM + row, mask=inside, other=0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    tl.store(out + (request * HEADS + head) * DIM + row, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _state_space_chunk(
    x, dt, b, c, gate, a, skip, dt_bias, state, out, read, write, query_start,
    x_stride, dt_stride, b_stride, c_stride, gate_stride, state_stride, dt_min, dt_max,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, STATE: tl.constexpr, STATE_PAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
    DIMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * DIMS + tl.arange(0, DIMS)[None, :]
    column = tl.arange(0, STATE_PAD)
    offset = tl.arange(0, CHUNK)
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    first = tl.load(query_start + request)
    last = tl.load(query_start + request + 1)
    rate = tl.load(a + head).to(tl.float32)
    # The state is held transposed, [N, P]: that is how it is multiplied by C.
    cell = (head * DIM + row) * STATE + column[:, None]
    carried = tl.zeros((STATE_PAD, DIMS), tl.float32)
    if source >= 0:
        here = (row < DIM) & (column[:, None] < STATE)
        carried += tl.load(state + source * state_stride + cell, mask=here, other=0.0).to(tl.float32)
    group = head // (HEADS // GROUPS) * STATE

    for start in range(first, last, CHUNK):
        position = start + offset
        active = position < last
        token = position.to(tl.int64)
        step = tl.load(dt + token * dt_stride + head, mask=active, other=0.0).to(tl.float32)
        if HAS_BIAS:
            step += tl.load(dt_bias + head).to(tl.float32)
        if SOFTPLUS:
            step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
        step = tl.where(step < dt_min, dt_min, tl.where(step > dt_max, dt_max, step))
        # Places behind the last token let the state as it is.
        step = tl.where(active, step, 0.0)
        decay = tl.cumsum(step * rate, axis=0)
        whole = tl.sum(step * rate, axis=0)

        inside, known = active[:, None], active[:, None]
        if DIM % DIMS:
            inside = inside & (row < DIM)
        if STATE_PAD != STATE:
            known = known & (column[None, :] < STATE)
        token = token[:, None]
        value = tl.load(x + token * x_stride + head * DIM + row, mask=inside, other=0.0)
        into = tl.load(b + token * b_stride + group + column[None, :], mask=known, other=0.0)
        out_of = tl.load(c + token * c_stride + group + column[None, :], mask=known, other=0.0)

        since = tl.where(position[:, None] >= position[None, :], decay[:, None] - decay[None, :], float("-inf"))
        scores = tl.dot(out_of, tl.trans(into), input_precision="ieee")
        scores = scores * tl.exp(since) * step[None, :]
        y = tl.dot(out_of, carried.to(out_of.dtype), input_precision="ieee") * tl.exp(decay)[:, None]
        y = tl.dot(scores.to(value.dtype), value, y, input_precision="ieee")
        added = (value.to(tl.float32) * (tl.exp(whole - decay) * step)[:, None]).to(into.dtype)
        carried = tl.dot(tl.trans(into), added, carried * tl.exp(whole), input_precision="ieee")

        if HAS_SKIP:
            y += value.to(tl.float32) * tl.load(skip + head).to(tl.float32)
        if HAS_GATE:
            z = tl.load(gate + token * gate_stride + head * DIM + row, mask=inside, other=0.0).to(tl.float32)
            y *= z / (1.0 + tl.exp(-z))
        tl.store(out + (token * HEADS + head) * DIM + row, y.to(out.dtype.element_ty), mask=inside)

    if target >= 0:
        here = (row < DIM) & (column[:, None] < STATE)
        tl.store(state + target * state_stride + cell, carried.to(state.dtype.element_ty), mask=here)


def state_space_step(
    launch: Launcher, inputs: StateSpaceInputs, space: StateSpace, state: torch.Tensor, slots: StateSlots
) -> torch.Tensor:
    """Advance each request by one token (T = R), the states in place. state: [num_slots, H, P, N], float32.

    Returns [R, H, P], dtype of x. Raises `ValueError`.
    """
    num_requests, heads, dim = _checked(inputs, space, state, slots, inputs.x.shape[0])
    out = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    config = launch.tuning.config("state_space_step", dim=dim, state=state.shape[3])
    arrays = _arrays(inputs, space, state, out, slots)
    grid = (heads, triton.cdiv(dim, config["DIMS"]), num_requests)
    sizes = _strides(inputs, state, space)
    constants = _constants(inputs, space, triton.next_power_of_2(state.shape[3]))
    launch(_state_space_step, grid, (*arrays, *sizes), config, **constants)
    return out


def state_space_chunk(
    launch: Launcher, inputs: StateSpaceInputs, space: StateSpace, state: torch.Tensor, slots: StateSlots,
    query_start: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Advance several requests by their packed tokens, the states in place. state: [num_slots, H, P, N], float32.

    query_start: [R + 1], int32. Returns [T, H, P], dtype of x; rows behind the last request are undefined. Products of
    matrices take operands in the dtype of x and add in float32. Raises `ValueError`.
    """
    num_requests, heads, dim = _checked(inputs, space, state, slots, query_start.shape[0] - 1)
    out = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
    bits = inputs.x.element_size() * 8
    config = launch.tuning.config("state_space_chunk", dim=dim, state=state.shape[3], bits=bits)
    arrays = (*_arrays(inputs, space, state, out, slots), query_start)
    grid = (heads, triton.cdiv(dim, config["DIMS"]), num_requests)
    sizes = _strides(inputs, state, space)
    constants = _constants(inputs, space, max(16, triton.next_power_of_2(state.shape[3])))
    launch(_state_space_chunk, grid, (*arrays, *sizes), config, **constants)
    return out


def _checked(
    inputs: StateSpaceInputs, space: StateSpace, state: torch.Tensor, slots: StateSlots, num_requests: int
) -> tuple[int, int, int]:
    """Raise `ValueError` where shapes do not fit; return numbers of requests and heads and the heads' dimension."""
    if inputs.x.dim() != 3 or inputs.b.dim() != 3 or state.dim() != 4:
        shapes = tuple(inputs.x.shape), tuple(inputs.b.shape), tuple(state.shape)
        raise ValueError(f"x, b and state of shapes {shapes} must be [T, H, P], [T, G, N] and [num_slots, H, P, N]")
    (num_tokens, heads, dim), (_, groups, size) = inputs.x.shape, inputs.b.shape
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups evenly; choose a divisor")
    check_rows("x", inputs.x, (num_tokens, heads, dim))
    check_rows("dt", inputs.dt, (num_tokens, heads))
    check_rows("b", inputs.b, (num_tokens, groups, size))
    check_rows("c", inputs.c, (num_tokens, groups, size))
    if inputs.gate is not None:
        check_rows("gate", inputs.gate, (num_tokens, heads, dim))
    for name, learned in (("a", space.a), ("skip", space.skip), ("dt_bias", space.dt_bias)):
        if learned is not None and learned.shape != (heads,):
            raise ValueError(f"{name} of shape {tuple(learned.shape)} for {heads} heads; it must be [H]")
    check_state("state space", state, (heads, dim, size), slots, num_requests)
    return num_requests, heads, dim


def _arrays(
    inputs: StateSpaceInputs, space: StateSpace, state: torch.Tensor, out: torch.Tensor, slots: StateSlots
) -> list[Argument]:
    arrays: list[Argument] = [inputs.x, inputs.dt, inputs.b, inputs.c, inputs.gate]
    return [*arrays, space.a, space.skip, space.dt_bias, state, out, slots.read, slots.write]


def _strides(inputs: StateSpaceInputs, state: torch.Tensor, space: StateSpace) -> list[Argument]:
    gate_stride = 0 if inputs.gate is None else inputs.gate.stride(0)
    strides = [rows.stride(0) for rows in (inputs.x, inputs.dt, inputs.b, inputs.c)]
    return [*strides, gate_stride, state.stride(0), float(space.dt_min), float(space.dt_max)]


def _constants(inputs: StateSpaceInputs, space: StateSpace, padded: int) -> dict[str, int | bool]:
    _, heads, dim = inputs.x.shape
    _, groups, size = inputs.b.shape
    shapes: dict[str, int | bool] = {"HEADS": heads, "GROUPS": groups, "DIM": dim, "STATE": size, "STATE_PAD": padded}
    has = {"HAS_BIAS": space.dt_bias is not None, "HAS_SKIP": space.skip is not None}
    return {**shapes, **has, "HAS_GATE": inputs.gate is not None, "SOFTPLUS": space.dt_softplus}


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: Mamba-2 2.7B (80 heads, 1 group), Bamba 9B and Nemotron-H 8B (128 heads)."""
    for dtype in (torch.bfloat16, torch.float16):
        for heads, groups, has_gate in ((80, 1, True), (128, 1, False), (128, 8, False)):
            x = torch.empty(64, heads, 64, dtype=dtype, device="meta")
            b = torch.empty(64, groups, 128, dtype=dtype, device="meta")
            inputs = StateSpaceInputs(x, x[:, :, 0].contiguous(), b, b, x if has_gate else None)
            learned = torch.empty(heads, dtype=torch.float32, device="meta")
            space = StateSpace(learned, learned, learned)
            state = torch.empty(64, heads, 64, 128, dtype=torch.float32, device="meta")
            indices = torch.empty(64, dtype=torch.int32, device="meta")
            query_start = torch.empty(65, dtype=torch.int32, device="meta")
            state_space_step(launch, inputs, space, state, StateSlots(indices, indices))
            state_space_chunk(launch, inputs, space, state, StateSlots(indices, indices), query_start)
