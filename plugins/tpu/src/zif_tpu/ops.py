"""The operators where static shapes ask for another way; the others are the reference's, which XLA compiles."""

import torch

from zif.contract import Activation, ExpertWeights, RouterOutput, Routing
from zif.reference.ops import ReferenceOps


class XlaOps(ReferenceOps):
    """Operators whose shapes do not depend on values."""

    def __init__(self) -> None:
        self._routed: RouterOutput | None = None

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gated = super().gated_activation(gate_up, activation)
        if activation != Activation.SWIGLU_CLAMPED:
            return gated
        # XLA's clamp makes a number of NaN.
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.where(gate.isnan() | up.isnan(), torch.nan, gated)

    def route(self, logits: torch.Tensor, num_experts_per_token: int, routing: Routing) -> RouterOutput:
        self._routed = super().route(logits, num_experts_per_token, routing)
        return self._routed

    def experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        """Run every expert on every token and sum those chosen.

        Raises `ValueError` on an expert that does not exist. What `route` gave last is known to be right; anything
        else is looked at, which waits for the device.
        """
        num_experts = weights.gate_up.shape[0]
        if routed is not self._routed:
            _check_experts(routed.expert_ids, num_experts)
        self._routed = None
        if not x.shape[0]:
            return x.new_zeros(0, weights.down.shape[1])
        ids = torch.arange(num_experts, device=x.device)
        chosen = routed.expert_ids[:, :, None] == ids  # [T, k, E]
        shares = (routed.weights[:, :, None] * chosen).sum(1).t()[:, :, None]  # [E, T, 1]
        outputs = self._all_experts(x, weights, activation).float() * shares
        # What an expert makes of a token that did not choose it may be infinite, and zero times infinity is NaN.
        return outputs.masked_fill(~chosen.any(1).t()[:, :, None], 0.0).sum(0).to(x.dtype)

    def _all_experts(self, x: torch.Tensor, weights: ExpertWeights, activation: Activation) -> torch.Tensor:
        """Return each expert's output for each token, [E, T, C]."""
        gate_up = torch.matmul(x, weights.gate_up.transpose(1, 2))
        if weights.gate_up_bias is not None:
            gate_up = gate_up + weights.gate_up_bias[:, None]
        down = torch.matmul(self.gated_activation(gate_up, activation), weights.down.transpose(1, 2))
        return down if weights.down_bias is None else down + weights.down_bias[:, None]


def _check_experts(expert_ids: torch.Tensor, num_experts: int) -> None:
    if expert_ids.numel():
        lowest, highest = int(expert_ids.min()), int(expert_ids.max())
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"expert ids from {lowest!r} to {highest!r} must be from 0 to {num_experts - 1}")
