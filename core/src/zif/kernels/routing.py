"""Choosing experts: the k best logits of a token, ties to the lowest id, and their shares. One program some rows."""

import torch
import triton
import triton.language as tl

from zif.contract import RouterOutput, Routing
from zif.kernels.launch import Launcher


@triton.jit(do_not_specialize=["num_rows"])
def _route(
    logits, weights, expert_ids, num_rows, num_experts, num_chosen, stride,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, ROUTING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)[None, :]
    inside = (row < num_rows)[:, None] & (expert < num_experts)
    value = tl.load(logits + row[:, None] * stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    # Integers in the order of the logits: zeros of both signs are 0, and a NaN is above all, as in a sort.
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    # The lowest id is the largest of the rest, so that one maximum finds the best and breaks the tie.
    key = (ordered.to(tl.int64) << 32) | (EXPERTS - 1 - expert)
    lowest = tl.full((ROWS, EXPERTS), -(2**63), tl.int64)
    key = tl.where(inside, key, lowest)
    place = tl.arange(0, CHOSEN)[None, :]
    found = tl.full((ROWS, CHOSEN), -(2**63), tl.int64)
    for index in range(num_chosen):
        best = tl.max(key, axis=1)[:, None]
        found = tl.where(place == index, best, found)
        key = tl.where(key == best, lowest, key)
    ids = EXPERTS - 1 - (found & 0xFFFFFFFF)
    bits = (found >> 32).to(tl.int32)
    missing = bits == 0x7FFFFFFF
    bits = tl.where(bits < 0, (-bits) | -(2**31), bits)
    chosen = tl.where(missing, float("nan"), bits.to(tl.float32, bitcast=True))
    # The first is the largest, or NaN where any is.
    first = tl.sum(tl.where(place == 0, chosen, 0.0), axis=1)[:, None]
    known = place < num_chosen
    share = tl.where(known, tl.exp(chosen - first), 0.0)
    if ROUTING == "softmax_topk":
        share /= tl.sum(tl.where(inside, tl.exp(value - first), 0.0), axis=1)[:, None]
    else:
        # Divided by their sum, the shares of all experts are those of a softmax of the chosen.
        share /= tl.sum(share, axis=1)[:, None]
    to = row[:, None] * num_chosen + place
    stored = (row < num_rows)[:, None] & known
    tl.store(weights + to, share, mask=stored)
    tl.store(expert_ids + to, ids, mask=stored)


def route(launch: Launcher, logits: torch.Tensor, num_experts_per_token: int, routing: Routing) -> RouterOutput:
    """Implement `OpTable.route`. logits: [T, E], bfloat16, float16 or float32.

    Where softmax gives NaN (a NaN or an infinity among the logits, or nothing but -inf) the weights are NaN; the ids
    are still distinct and in order, NaN first. Raises `ValueError` where more experts are asked for than there are.
    """
    num_rows, num_experts = logits.shape
    if not 1 <= num_experts_per_token <= num_experts:
        raise ValueError(f"num_experts_per_token {num_experts_per_token} must be from 1 to {num_experts}, all experts")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits of {logits.dtype} must be of bfloat16, float16 or float32; convert them")
    weights = torch.empty(num_rows, num_experts_per_token, dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty(num_rows, num_experts_per_token, dtype=torch.int64, device=logits.device)
    config = launch.tuning.config("route", experts=num_experts)
    launch(
        _route,
        (triton.cdiv(num_rows, config["ROWS"]),),
        (logits, weights, expert_ids, num_rows, num_experts, num_experts_per_token, logits.stride(0)),
        config,
        EXPERTS=triton.next_power_of_2(num_experts),
        CHOSEN=triton.next_power_of_2(num_experts_per_token),
        ROUTING=routing.value,
    )
    return RouterOutput(weights, expert_ids)


def representative(launch: Launcher) -> None:
    """Start the kernels as models do: Mixtral-8x7B, gpt-oss-20b, Qwen3-30B-A3B, DeepSeek-V3's width, 512 experts."""
    models = (
        (8, 2, Routing.SOFTMAX_TOPK_NORMALIZED),
        (32, 4, Routing.TOPK_SOFTMAX),
        (128, 8, Routing.SOFTMAX_TOPK_NORMALIZED),
        (256, 8, Routing.SOFTMAX_TOPK),
        (512, 16, Routing.SOFTMAX_TOPK),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_experts, num_chosen, routing in models:
            logits = torch.empty(64, num_experts, dtype=dtype, device="meta")
            route(launch, logits, num_chosen, routing)
