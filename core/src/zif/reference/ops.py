"""Executable semantics of the operators, in plain torch.

The specification that platforms are held to, and the fallback that serves what a platform does not implement itself.
Written to be read: no kernel, no caching. A NaN in a token's row stays in that row, in every operator. What is said to
be computed in float32 is computed in float64 when the arguments are: that is how an oracle runs it.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from zif.contract import (
    Activation,
    ExpertWeights,
    NormOutput,
    OpTable,
    QuantizedExperts,
    QuantizedWeight,
    RotatedHeads,
    RouterOutput,
    Routing,
)
from zif.reference.quantization import multiply, part_of

SWIGLU_LIMIT = 7.0
SWIGLU_ALPHA = 1.702


class ReferenceOps(OpTable):
    """Every operator in plain torch, for any dtype, device and strides."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        wide = _wide(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * (_wide(weight) + weight_offset)).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        total = residual + x
        return NormOutput(self.rms_norm(total, weight, eps, weight_offset), total)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        rotate = _rotate_pairs if interleaved else _rotate_halves
        cos, sin = cos[:, None, :], sin[:, None, :]
        return RotatedHeads(rotate(query, cos, sin), rotate(key, cos, sin))

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        if gate_up.shape[-1] % 2:
            # Two parts that differ by one may still be broadcast.
            raise ValueError(f"gate_up has {gate_up.shape[-1]!r} columns; gate and up must be of one width")
        gate, up = _wide(gate_up).chunk(2, dim=-1)
        return _gated(gate, up, activation).to(gate_up.dtype)

    def route(self, logits: torch.Tensor, num_experts_per_token: int, routing: Routing) -> RouterOutput:
        # A stable sort, because topk leaves the order of ties open.
        ordered, ids = _wide(logits).sort(dim=-1, descending=True, stable=True)
        expert_ids = ids[:, :num_experts_per_token].contiguous()
        if routing == Routing.TOPK_SOFTMAX:
            return RouterOutput(ordered[:, :num_experts_per_token].softmax(-1), expert_ids)
        weights = ordered.softmax(-1)[:, :num_experts_per_token]
        if routing == Routing.SOFTMAX_TOPK_NORMALIZED:
            weights = weights / weights.sum(-1, keepdim=True)
        return RouterOutput(weights.contiguous(), expert_ids)

    def experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        """Run each chosen expert once, on all its tokens together.

        The sum over experts is in float32 and in the order of expert ids, so it does not depend on the other tokens.
        Raises `ValueError` on an expert that does not exist.
        """

        def one(x: torch.Tensor, expert: int) -> torch.Tensor:
            gate_up = self.linear(x, weights.gate_up[expert], _entry(weights.gate_up_bias, expert))
            inner = self.gated_activation(gate_up, activation)
            return self.linear(inner, weights.down[expert], _entry(weights.down_bias, expert))

        return _sum_of_experts(x, routed, weights.gate_up.shape[0], one)

    def quantized_linear(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return multiply(x, weight, bias)

    def quantized_experts(
        self, x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        """Run each chosen expert once. Raises `ValueError` on an expert that does not exist."""

        def one(x: torch.Tensor, expert: int) -> torch.Tensor:
            gate_up = self.quantized_linear(x, part_of(weights.gate_up, expert), _entry(weights.gate_up_bias, expert))
            inner = self.gated_activation(gate_up, activation)
            return self.quantized_linear(inner, part_of(weights.down, expert), _entry(weights.down_bias, expert))

        return _sum_of_experts(x, routed, weights.gate_up.codes.shape[0], one)


def _entry(stack: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if stack is None else stack[index]


def _sum_of_experts(
    x: torch.Tensor, routed: RouterOutput, num_experts: int, one: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Sum the chosen experts' outputs by their weights. one: the outputs of some rows of x by one expert, [n, C]."""
    _check_experts(routed.expert_ids, num_experts)
    num_chosen = routed.expert_ids.shape[1]
    order = routed.expert_ids.flatten().argsort(stable=True)
    counts = torch.bincount(routed.expert_ids.flatten(), minlength=num_experts).tolist()
    total = torch.zeros(x.shape, dtype=_wide(x[:0]).dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            entries = order[start : start + count]
            tokens = entries // num_chosen
            share = routed.weights.flatten()[entries, None]
            total.index_add_(0, tokens, _wide(one(x[tokens], expert)) * share)
            start += count
    return total.to(x.dtype)


def _check_experts(expert_ids: torch.Tensor, num_experts: int) -> None:
    if expert_ids.numel():
        lowest, highest = (int(bound) for bound in expert_ids.aminmax())
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"expert ids from {lowest!r} to {highest!r} must be from 0 to {num_experts - 1}")


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x as float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def _rotate_halves(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second = _wide(heads[..., :half]), _wide(heads[..., half : 2 * half])
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(heads.dtype), heads[..., 2 * half :]), dim=-1)


def _rotate_pairs(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    end = 2 * cos.shape[-1]
    first, second = _wide(heads[..., 0:end:2]), _wide(heads[..., 1:end:2])
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(heads.dtype), heads[..., end:]), dim=-1)


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation == Activation.SILU:
        return functional.silu(gate) * up
    if activation == Activation.GELU:
        return functional.gelu(gate) * up
    if activation == Activation.GELU_TANH:
        return functional.gelu(gate, approximate="tanh") * up
    gate = gate.clamp(max=SWIGLU_LIMIT)
    up = up.clamp(min=-SWIGLU_LIMIT, max=SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)
