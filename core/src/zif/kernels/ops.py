"""The operators of the contract, served by kernels; plain products go to the array library, which has the best."""

import weakref

import torch

from zif.contract import (
    Activation,
    ChosenTokens,
    DrawOptions,
    ExpertWeights,
    NormOutput,
    RotatedHeads,
    RouterOutput,
    Routing,
)
from zif.kernels import activations, experts, norms, rotary, routing, sampling
from zif.kernels.greedy import greedy
from zif.kernels.launch import Launcher
from zif.reference.ops import ReferenceOps


class KernelOps(ReferenceOps):
    """Operators by kernels, for float32, bfloat16 and float16.

    Ids of experts are looked at, which waits for the device, unless they come from `route` of the same object,
    over no more experts than there are: these exist by construction.
    """

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch
        self._routed: weakref.ref[torch.Tensor] | None = None
        self._num_routed = 0

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        return norms.rms_norm(self._launch, x, weight, eps, weight_offset)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        return norms.add_rms_norm(self._launch, x, residual, weight, eps, weight_offset)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        return rotary.rotate(self._launch, query, key, cos, sin, interleaved)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return activations.gated_activation(self._launch, gate_up, activation)

    def route(self, logits: torch.Tensor, num_experts_per_token: int, routing_kind: Routing) -> RouterOutput:
        routed = routing.route(self._launch, logits, num_experts_per_token, routing_kind)
        self._routed, self._num_routed = weakref.ref(routed.expert_ids), logits.shape[1]
        return routed

    def experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        num_experts = weights.gate_up.shape[0]
        known = self._routed is not None and self._routed() is routed.expert_ids
        if not known or self._num_routed > num_experts:
            experts.check_expert_ids(routed.expert_ids, num_experts)
        return experts.experts(self._launch, x, weights, routed, activation)

    def choose_tokens(self, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens:
        if not options.temperature.any():
            return greedy(self._launch, logits)
        return sampling.sample(self._launch, logits, sampling.columns_on_device(options, logits.device))
