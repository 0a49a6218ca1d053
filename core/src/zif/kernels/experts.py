"""A layer of experts: pairs of token and expert are grouped by expert on the device, then multiplied group by group.

The groups are padded to whole tiles of rows, so that a tile has one expert. Nothing waits for the host: the grid has
room for the most tiles there can be, and programs of tiles that are not there return at once. No atomics: a pair's
row is computed by itself, and a token's rows are summed in the order of its expert ids, whatever other tokens chose.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from zif.contract import Activation, ExpertWeights, RouterOutput
from zif.kernels.launch import Launcher
from zif.kernels.linear import check_dtype, tile_of


@triton.jit(do_not_specialize=["num_pairs"])
def _count_pairs(expert_ids, counts, num_pairs, PAIRS: tl.constexpr):
    expert = tl.program_id(0)
    found = tl.full((PAIRS,), 0, tl.int32)
    for at in range(0, num_pairs, PAIRS):
        pair = at + tl.arange(0, PAIRS)
        found += (tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_pairs(
    expert_ids, counts, pairs, tile_experts, num_pairs, num_experts, num_tiles,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    others = tl.arange(0, EXPERTS)
    tiles = tl.cdiv(tl.load(counts + others, mask=others < num_experts, other=0), ROWS)
    first = tl.sum(tl.where(others < expert, tiles, 0), axis=0)
    own = tl.sum(tl.where(others == expert, tiles, 0), axis=0)
    place = tl.arange(0, PAIRS)
    seen = 0
    for at in range(0, num_pairs, PAIRS):
        pair = at + place
        mine = (tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
        rank = seen + tl.cumsum(mine, axis=0) - 1
        tl.store(pairs + first * ROWS + rank, pair, mask=mine > 0)
        seen += tl.sum(mine, axis=0)
    padding = seen + tl.arange(0, ROWS)
    tl.store(pairs + first * ROWS + padding, -1, mask=padding < own * ROWS)
    for at in range(0, own, PAIRS):
        tl.store(tile_experts + first + at + place, expert, mask=at + place < own)
    if expert == num_experts - 1:
        for at in range(first + own, num_tiles, PAIRS):
            tl.store(tile_experts + at + place, -1, mask=at + place < num_tiles)


@triton.jit
def _gated(gate, up, ACTIVATION: tl.constexpr):
    """Return f(gate) * up of float32, as `zif.reference` computes it. A NaN passes through all comparisons."""
    if ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(a)) is the sigmoid of 2 a.
        twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1.0 + tl.exp(-twice)) * up
    elif ACTIVATION == "swiglu_clamped":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        value = (up + 1.0) * gate / (1.0 + tl.exp(-1.702 * gate))
    else:
        value = gate / (1.0 + tl.exp(-gate)) * up
    return value


@triton.jit(do_not_specialize=["num_tiles"])
def _expert_linear(
    x, weight, bias, out, pairs, tile_experts, num_tiles, num_columns, inner, num_chosen,
    x_stride, expert_stride, weight_stride, bias_stride, up_offset,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, DIES: tl.constexpr,
    EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(tl.program_id(0), num_tiles * ROWS, num_columns, ROWS, COLUMNS, GROUP, DIES)
    expert = tl.load(tile_experts + row_tile).to(tl.int64)
    if expert < 0:
        return
    # A row without a pair reads row 0, and is not stored.
    pair = tl.load(pairs + row_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.maximum(pair, 0) // num_chosen
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    kept = tl.minimum(columns, num_columns - 1).to(tl.int64)
    place = tl.arange(0, INNER)
    x_tile = x + token[:, None] * x_stride + place[None, :]
    weight_tile = weight + expert * expert_stride + kept[None, :] * weight_stride + place[:, None]
    total = tl.full((ROWS, COLUMNS), 0, tl.float32)
    gated: tl.constexpr = ACTIVATION != "none"
    # Rows of gates come before rows of what they gate.
    up_tile = weight_tile + up_offset
    up_total = total
    for at in range(0, inner, INNER):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = at + place < inner
            left = tl.load(x_tile, mask=inside[None, :], other=0.0)
            right = tl.load(weight_tile, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        if gated:
            if EVEN:
                right = tl.load(up_tile)
            else:
                right = tl.load(up_tile, mask=(at + place < inner)[:, None], other=0.0)
            up_total = tl.dot(left, right, up_total, input_precision="ieee")
            up_tile += INNER
        x_tile += INNER
        weight_tile += INNER
    if bias is not None:
        total += tl.load(bias + expert * bias_stride + kept).to(tl.float32)[None, :]
        if gated:
            up_total += tl.load(bias + expert * bias_stride + num_columns + kept).to(tl.float32)[None, :]
    # The outputs of each product have the model's dtype before anything else is done with them.
    total = total.to(out.dtype.element_ty)
    if gated:
        up_total = up_total.to(out.dtype.element_ty)
        total = _gated(total.to(tl.float32), up_total.to(tl.float32), ACTIVATION).to(out.dtype.element_ty)
    inside = (pair >= 0)[:, None] & (columns < num_columns)[None, :]
    tl.store(out + pair[:, None] * num_columns + columns[None, :], total, mask=inside)


@triton.jit
def _combine(
    outputs, expert_ids, weights, total, num_experts, num_chosen, num_columns,
    CHOSEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    place = tl.arange(0, CHOSEN)
    ids = tl.load(expert_ids + token * num_chosen + place, mask=place < num_chosen, other=-1)
    shares = tl.load(weights + token * num_chosen + place, mask=place < num_chosen, other=0.0).to(tl.float32)
    # Ids in their order, and behind them those of experts that do not exist.
    missing = num_experts * CHOSEN
    order = tl.where((ids >= 0) & (ids < num_experts), ids.to(tl.int32) * CHOSEN + place, missing)
    summed = tl.full((COLUMNS,), 0, tl.float32)
    for _ in range(num_chosen):
        first = tl.min(order, axis=0)
        # What is read for a missing one is the place of the first choice, and not used.
        pair = token * num_chosen + first % CHOSEN
        share = tl.sum(tl.where(order == first, shares, 0.0), axis=0)
        output = tl.load(outputs + pair * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        summed += tl.where(first < missing, output * share, 0.0)
        order = tl.where(order == first, missing, order)
    tl.store(total + token * num_columns + columns, summed.to(total.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs by expert. pairs: [num_tiles * tile_rows], int32, -1 where padded. tile_experts: [num_tiles], int32.

    Tile t has the pairs of expert tile_experts[t], or is not there (-1). Pair p is choice p % k of token p // k.
    """

    pairs: torch.Tensor
    tile_experts: torch.Tensor
    tile_rows: int


def group_pairs(launch: Launcher, expert_ids: torch.Tensor, num_experts: int, batch_invariant: bool = False) -> Groups:
    """Group the pairs of expert_ids [T, k] by expert. Ids of experts that do not exist are in no group."""
    num_pairs, device = expert_ids.numel(), expert_ids.device
    config = launch.tuning.config(
        "group_pairs", rows_per_expert=0 if batch_invariant else triton.cdiv(num_pairs, num_experts)
    )
    # An expert with pairs begins one tile, and every other tile is full.
    num_tiles = min(num_pairs // config["ROWS"] + min(num_experts, num_pairs), num_pairs)
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    pairs = torch.empty(num_tiles * config["ROWS"], dtype=torch.int32, device=device)
    tile_experts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    ids = expert_ids.contiguous()
    launch(_count_pairs, (num_experts,), (ids, counts, num_pairs), config)
    arguments = (ids, counts, pairs, tile_experts, num_pairs, num_experts, num_tiles)
    launch(_place_pairs, (num_experts,), arguments, config, EXPERTS=triton.next_power_of_2(num_experts))
    return Groups(pairs, tile_experts, config["ROWS"])


def experts(
    launch: Launcher,
    x: torch.Tensor,
    weights: ExpertWeights,
    routed: RouterOutput,
    activation: Activation,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Implement `OpTable.experts` for bfloat16, float16 and float32.

    Experts that do not exist contribute nothing; `check_expert_ids` refuses them. With `batch_invariant` the tiles are
    the same for any number of tokens. Raises `ValueError` on shapes or dtypes that do not fit.
    """
    _check(x, weights, routed)
    num_tokens, num_columns = x.shape[0], weights.down.shape[1]
    total = torch.empty(num_tokens, num_columns, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return total
    num_experts, num_chosen = weights.down.shape[0], routed.expert_ids.shape[1]
    groups = group_pairs(launch, routed.expert_ids, num_experts, batch_invariant)
    hidden = _expert_product(launch, x, (weights.gate_up, weights.gate_up_bias), groups, activation, num_chosen)
    outputs = _expert_product(launch, hidden, (weights.down, weights.down_bias), groups, None, num_chosen)
    config = launch.tuning.config("combine", columns=num_columns)
    ids, shares = routed.expert_ids.contiguous(), routed.weights.contiguous()
    arguments = (outputs, ids, shares, total, num_experts, num_chosen, num_columns)
    grid = num_tokens, triton.cdiv(num_columns, config["COLUMNS"])
    launch(_combine, grid, arguments, config, CHOSEN=triton.next_power_of_2(num_chosen))
    return total


def _expert_product(
    launch: Launcher,
    x: torch.Tensor,
    weight_and_bias: tuple[torch.Tensor, torch.Tensor | None],
    groups: Groups,
    activation: Activation | None,
    num_chosen: int,
) -> torch.Tensor:
    """Multiply each pair's row of x by its expert's weight. Gated: x has a row of each token, else of each pair."""
    weight, bias = weight_and_bias
    num_pairs = x.shape[0] * (num_chosen if activation else 1)
    num_columns, inner = weight.shape[1] // (2 if activation else 1), weight.shape[2]
    out = torch.empty(num_pairs, num_columns, dtype=x.dtype, device=x.device)
    config = launch.tuning.config(
        "expert_linear",
        tile_rows=groups.tile_rows,
        gated=int(activation is not None),
        columns=num_columns,
        inner=inner,
        remainder=inner % 128,
        element_bytes=x.element_size(),
    )
    num_tiles = len(groups.tile_experts)
    sizes = num_tiles, num_columns, inner, num_chosen if activation else 1
    strides = x.stride(0), weight.stride(0), weight.stride(1), 0 if bias is None else bias.stride(0)
    up_offset = num_columns * weight.stride(1)
    launch(
        _expert_linear,
        (num_tiles * triton.cdiv(num_columns, config["COLUMNS"]),),
        (x, weight, bias, out, groups.pairs, groups.tile_experts, *sizes, *strides, up_offset),
        config,
        ROWS=groups.tile_rows,
        EVEN=inner % config["INNER"] == 0,
        ACTIVATION=activation.value if activation else "none",
    )
    return out


def check_expert_ids(expert_ids: torch.Tensor, num_experts: int) -> None:
    """Raise `ValueError` on ids of experts that do not exist. Waits for the device: `experts` does not call it."""
    if expert_ids.numel():
        lowest, highest = (int(bound) for bound in expert_ids.aminmax())
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"expert ids from {lowest!r} to {highest!r} must be from 0 to {num_experts - 1}")


def _check(x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput) -> None:
    check_dtype(x)
    num_experts, channels, inner = weights.down.shape
    shapes = {
        "gate_up": (weights.gate_up, [num_experts, 2 * inner, x.shape[1]]),
        "down": (weights.down, [num_experts, channels, inner]),
        "gate_up_bias": (weights.gate_up_bias, [num_experts, 2 * inner]),
        "down_bias": (weights.down_bias, [num_experts, channels]),
    }
    for name, (array, expected) in shapes.items():
        if array is None:
            continue
        if list(array.shape) != expected or array.dtype != x.dtype:
            given = f"{list(array.shape)} of {array.dtype}"
            raise ValueError(f"{name}, {given}, must be {expected} of {x.dtype}, as x and down are")
        if array.shape[-1] > 1 and array.stride(-1) != 1:
            raise ValueError(f"{name} has stride {array.stride(-1)} in its last axis, which must be dense (1)")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x has stride {x.stride(1)} in its last axis, which must be dense (1)")
    ids, shares = list(routed.expert_ids.shape), list(routed.weights.shape)
    if ids != shares or ids[0] != x.shape[0] or routed.expert_ids.dtype != torch.int64:
        given = f"{ids} of {routed.expert_ids.dtype}, and weights, {shares},"
        raise ValueError(f"expert_ids, {given} must be [{x.shape[0]}, k] and the ids of torch.int64")


_MODELS = (
    (8, 2, 4096, 14336, Activation.SILU, False),
    (32, 4, 2880, 2880, Activation.SWIGLU_CLAMPED, True),
    (128, 8, 2048, 768, Activation.SILU, False),
)
"""Mixtral-8x7B, gpt-oss-20b, Qwen3-30B-A3B: experts, those of a token, channels, inner size, activation, biases."""


def representative(launch: Launcher) -> None:
    """Start the kernels as models do."""
    for num_experts, num_chosen, channels, inner, activation, biased in _MODELS:
        for num_tokens in (1, 64, 4096):
            x = torch.empty(num_tokens, channels, dtype=torch.bfloat16, device="meta")
            gate_up, down = x.new_empty(num_experts, 2 * inner, channels), x.new_empty(num_experts, channels, inner)
            biases = (x.new_empty(num_experts, 2 * inner), x.new_empty(num_experts, channels)) if biased else ()
            ids = x.new_empty(num_tokens, num_chosen, dtype=torch.int64)
            routed = RouterOutput(x.new_empty(num_tokens, num_chosen, dtype=torch.float32), ids)
            experts(launch, x, ExpertWeights(gate_up, down, *biases), routed, activation)
