"""Causal depthwise convolution with state, as Mamba and gated delta-net layers have before their recurrence.

    y[t, c] = f(bias[c] + sum_w weight[c, w] * x[t - W + 1 + w, c]),  inputs before the request's first token are zero

The state of a request is its last S >= W - 1 inputs per channel, newest last: [num_slots, C, S]. Core keeps S = W.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.contract import Activation
from zif.kernels.launch import Argument, Launcher
from zif.kernels.state_slots import StateSlots, check_rows, check_state, token_requests


@dataclass(frozen=True, slots=True)
class Convolution:
    """weight: [C, W], the newest input's tap last. bias: [C]. activation: None or SILU."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: Activation | None = None


@triton.jit
def _convolution_step(
    x, weight, bias, state, out, read, write, x_stride, state_stride, channels,
    WIDTH: tl.constexpr, KEPT: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    flat = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel = flat[:, None]
    place = tl.arange(0, WINDOW)[None, :]
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    inside = channel < channels
    # The window is the old state with the new input behind it.
    kept = inside & (place < tl.where(source < 0, 0, KEPT))
    old = tl.load(state + source * state_stride + channel * KEPT + place, mask=kept, other=0.0).to(tl.float32)
    new = tl.load(x + request * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    window = tl.where(place == KEPT, new, old)
    tap = place - (KEPT + 1 - WIDTH)
    used = (tap >= 0) & (tap < WIDTH)
    factor = tl.load(weight + channel * WIDTH + tap, mask=inside & used, other=0.0).to(tl.float32)
    total = tl.sum(tl.where(used, window * factor, 0.0), axis=1)
    if HAS_BIAS:
        total += tl.load(bias + flat, mask=flat < channels, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(out + request * channels + flat, total.to(out.dtype.element_ty), mask=flat < channels)
    # Entries move by one place, so another thread's load must not come after this thread's store.
    tl.debug_barrier()
    moved = inside & (place > 0) & (place <= tl.where(target < 0, 0, KEPT))
    to = state + target * state_stride + channel * KEPT + place - 1
    tl.store(to, window.to(state.dtype.element_ty), mask=moved)


@triton.jit
def _convolution_chunk(
    x, weight, bias, state, out, requests, query_start, read,
    x_stride, state_stride, num_tokens, num_requests, channels,
    WIDTH: tl.constexpr, KEPT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channel < channels
    request = tl.load(requests + token, mask=token < num_tokens, other=num_requests)
    active = request < num_requests
    offset = token - tl.load(query_start + request, mask=active, other=0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH):
        back = WIDTH - 1 - tap
        here = (active & (offset >= back))[:, None] & inside
        value = tl.load(x + (token - back)[:, None] * x_stride + channel, mask=here, other=0.0).to(tl.float32)
        total += value * tl.load(weight + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
    if tl.min(tl.where(active, offset, WIDTH), axis=0) < WIDTH - 1:
        # Near a request's beginning, older inputs come from its state.
        source = tl.load(read + request, mask=active, other=-1).to(tl.int64)
        for tap in tl.static_range(WIDTH - 1):
            back = WIDTH - 1 - tap
            here = (active & (offset < back) & (source >= 0))[:, None] & inside
            place = (source * state_stride + offset - back + KEPT)[:, None] + channel * KEPT
            value = tl.load(state + place, mask=here, other=0.0).to(tl.float32)
            total += value * tl.load(weight + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where(active[:, None], total, 0.0)
    outside = (token < num_tokens)[:, None] & inside
    tl.store(out + token[:, None] * channels + channel, total.to(out.dtype.element_ty), mask=outside)


@triton.jit
def _convolution_state(
    x, state, query_start, read, write, x_stride, state_stride, channels,
    KEPT: tl.constexpr, WINDOW: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1)
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    place = tl.arange(0, WINDOW)[None, :]
    inside = (channel < channels) & (place < KEPT)
    first = tl.load(query_start + request)
    length = tl.load(query_start + request + 1) - first
    source = tl.load(read + request).to(tl.int64)
    target = tl.load(write + request).to(tl.int64)
    index = length - KEPT + place
    row = (first + index).to(tl.int64)
    new = tl.load(x + row * x_stride + channel, mask=inside & (index >= 0), other=0.0).to(tl.float32)
    from_state = inside & (index < tl.where(source < 0, -KEPT, 0))
    old = tl.load(state + source * state_stride + channel * KEPT + place + length, mask=from_state, other=0.0)
    value = tl.where(index >= 0, new, old.to(tl.float32))
    # As in the step: what one thread stores, another may still have to load.
    tl.debug_barrier()
    to = state + target * state_stride + channel * KEPT + place
    tl.store(to, value.to(state.dtype.element_ty), mask=inside & (place < tl.where(target < 0, 0, KEPT)))


def convolution_step(
    launch: Launcher, x: torch.Tensor, convolution: Convolution, state: torch.Tensor, slots: StateSlots
) -> torch.Tensor:
    """Convolve one token of each request and update the states in place.

    x: [R, C]. state: [num_slots, C, S]. Returns [R, C], dtype of x. Sums are float32. Raises `ValueError`.
    """
    _check(x, convolution, state, slots, x.shape[0])
    num_requests, channels = x.shape
    width, kept = convolution.weight.shape[1], state.shape[2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = launch.tuning.config("convolution_step", channels=channels)
    grid = (triton.cdiv(channels, config["CHANNELS"]), num_requests)
    arrays = (x, convolution.weight, convolution.bias, state, out, slots.read, slots.write)
    sizes = (x.stride(0), state.stride(0), channels)
    constants = _constants(convolution) | {"WIDTH": width, "KEPT": kept, "WINDOW": triton.next_power_of_2(kept + 1)}
    launch(_convolution_step, grid, (*arrays, *sizes), config, **constants)
    return out


def convolution_chunk(
    launch: Launcher, x: torch.Tensor, convolution: Convolution, state: torch.Tensor, slots: StateSlots,
    query_start: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Convolve packed tokens of several requests, each from its state on, and update the states in place.

    x: [T, C]. state: [num_slots, C, S]. query_start: [R + 1], int32. Returns [T, C], dtype of x; rows behind the last
    request are zero. Sums are float32. Raises `ValueError`.
    """
    _check(x, convolution, state, slots, query_start.shape[0] - 1)
    num_tokens, channels = x.shape
    width, kept = convolution.weight.shape[1], state.shape[2]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = launch.tuning.config("convolution_chunk", channels=channels)
    grid = triton.cdiv(channels, config["CHANNELS"]), triton.cdiv(num_tokens, config["TOKENS"])
    requests = token_requests(query_start, num_tokens)
    arguments: list[Argument] = [x, convolution.weight, convolution.bias, state, out, requests, query_start, slots.read]
    arguments += [x.stride(0), state.stride(0), num_tokens, slots.num_requests, channels]
    launch(_convolution_chunk, grid, arguments, config, WIDTH=width, KEPT=kept, **_constants(convolution))
    # A kernel of its own: the one before reads the states that this one overwrites.
    config = launch.tuning.config("convolution_state", channels=channels)
    grid = triton.cdiv(channels, config["CHANNELS"]), slots.num_requests
    arguments = [x, state, query_start, slots.read, slots.write, x.stride(0), state.stride(0), channels]
    launch(_convolution_state, grid, arguments, config, KEPT=kept, WINDOW=triton.next_power_of_2(kept))
    return out


def _check(
    x: torch.Tensor, convolution: Convolution, state: torch.Tensor, slots: StateSlots, num_requests: int
) -> None:
    if x.dim() != 2 or convolution.weight.dim() != 2:
        shapes = tuple(x.shape), tuple(convolution.weight.shape)
        raise ValueError(f"convolution of x and weight with shapes {shapes}; they must be [T, C] and [C, W]")
    channels, width = x.shape[1], convolution.weight.shape[1]
    check_rows("convolution input", x, tuple(x.shape))
    if not convolution.weight.is_contiguous() or convolution.weight.shape[0] != channels:
        raise ValueError(f"convolution weight {tuple(convolution.weight.shape)} must be dense, for {channels} channels")
    if convolution.activation not in (None, Activation.SILU):
        raise ValueError(f"convolution with activation {convolution.activation!r}; it may be None or SILU")
    kept = state.shape[-1]
    if kept < max(1, width - 1):
        raise ValueError(f"convolution state of {kept} inputs; a kernel of width {width} needs {max(1, width - 1)}")
    check_state("convolution", state, (channels, kept), slots, num_requests)


def _constants(convolution: Convolution) -> dict[str, bool]:
    return {"HAS_BIAS": convolution.bias is not None, "SILU": convolution.activation is not None}


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: Mamba-2 2.7B (5376 channels, bias), Qwen3-Next (8192 channels, none)."""
    for dtype in (torch.bfloat16, torch.float16):
        for channels, kept, has_bias in ((5376, 4, True), (8192, 3, False)):
            x = torch.empty(64, channels, dtype=dtype, device="meta")
            bias = x[0] if has_bias else None
            weight = torch.empty(channels, 4, dtype=dtype, device="meta")
            convolution = Convolution(weight, bias, Activation.SILU)
            state = torch.empty(64, channels, kept, dtype=dtype, device="meta")
            indices = torch.empty(64, dtype=torch.int32, device="meta")
            query_start = torch.empty(65, dtype=torch.int32, device="meta")
            convolution_step(launch, x, convolution, state, StateSlots(indices, indices))
            convolution_chunk(launch, x, convolution, state, StateSlots(indices, indices), query_start)
