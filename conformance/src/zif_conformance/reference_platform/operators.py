"""The operators in plain torch, each written in another way than `zif.reference` writes it.

A vendor replaces those that its device is better at, derives from `zif.reference.ops.ReferenceOps` for the others, and
names both in its plan. Computed in float32, rounded once.
"""

import math

import torch
from torch.nn import functional

from zif.contract import (
    Activation,
    ChosenTokens,
    DrawOptions,
    ExpertWeights,
    NormOutput,
    OpTable,
    QuantizedExperts,
    QuantizedWeight,
    RotatedHeads,
    RouterOutput,
    Routing,
)
from zif_conformance.reference_platform.faults import FaultInjector
from zif_conformance.reference_platform.quantized import expert_of, quantized_product

_SWIGLU_LIMIT = 7.0
_SWIGLU_ALPHA = 1.702


class TorchOperators(OpTable):
    """Every operator, for any strides of the first axis."""

    def __init__(self, faults: FaultInjector) -> None:
        self._faults = faults

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._faults.kernel()
        return _linear(x.float(), weight, bias).to(x.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        self._faults.kernel()
        return functional.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        total = x + residual
        return NormOutput(self.rms_norm(total, weight, eps, weight_offset), total)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        self._faults.kernel()
        turn = torch.complex(cos.float(), sin.float())[:, None]
        return RotatedHeads(_turned(query, turn, interleaved), _turned(key, turn, interleaved))

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        self._faults.kernel()
        return _gated(gate_up.float(), activation).to(gate_up.dtype)

    def gated_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | QuantizedWeight,
        bias: torch.Tensor | None,
        activation: Activation,
    ) -> torch.Tensor:
        self._faults.kernel()
        if isinstance(weight, QuantizedWeight):
            gate_up = quantized_product(x.float(), weight, bias)
        else:
            gate_up = _linear(x.float(), weight, bias)
        return _gated(gate_up, activation).to(x.dtype)

    def route(self, logits: torch.Tensor, num_experts_per_token: int, routing: Routing) -> RouterOutput:
        self._faults.kernel()
        wide = logits.float()
        # Stable: of equal logits the first expert goes first.
        expert_ids = wide.argsort(dim=-1, descending=True, stable=True)[:, :num_experts_per_token]
        if routing == Routing.TOPK_SOFTMAX:
            return RouterOutput(wide.gather(-1, expert_ids).softmax(-1), expert_ids)
        weights = wide.softmax(-1).gather(-1, expert_ids)
        if routing == Routing.SOFTMAX_TOPK_NORMALIZED:
            weights = weights / weights.sum(-1, keepdim=True)
        return RouterOutput(weights, expert_ids)

    def experts(
        self, x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        self._faults.kernel()
        total = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.float32)
        if ((routed.expert_ids < 0) | (routed.expert_ids >= len(weights.gate_up))).any():
            raise ValueError(f"expert ids must be from 0 to {len(weights.gate_up) - 1}: {routed.expert_ids!r}")
        for expert in sorted(set(routed.expert_ids.flatten().tolist())):
            tokens, choices = (routed.expert_ids == expert).nonzero(as_tuple=True)
            share = routed.weights[tokens, choices].float()
            total[tokens] += share[:, None] * _expert(x[tokens].float(), weights, expert, activation)
        return total.to(x.dtype)

    def quantized_linear(self, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        self._faults.kernel()
        return quantized_product(x.float(), weight, bias).to(x.dtype)

    def quantized_experts(
        self, x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
    ) -> torch.Tensor:
        self._faults.kernel()
        num_experts = len(weights.gate_up.codes)
        if not all(0 <= expert < num_experts for expert in routed.expert_ids.flatten().tolist()):
            raise ValueError(f"ids of quantized experts must be from 0 to {num_experts - 1}: {routed.expert_ids!r}")
        out = torch.zeros(x.shape)
        for expert in range(num_experts):
            rows, places = torch.where(routed.expert_ids == expert)
            if len(rows):
                own = _quantized_expert(x[rows].float(), weights, expert, activation)
                out.index_add_(0, rows, own * routed.weights[rows, places, None])
        return out.to(x.dtype)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self._faults.kernel()
        return _linear(hidden.float(), weight, bias)

    def quantized_logits(
        self, hidden: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        self._faults.kernel()
        return quantized_product(hidden.float(), weight, bias)

    def choose_tokens(self, logits: torch.Tensor, options: DrawOptions) -> ChosenTokens:
        self._faults.kernel()
        peaks = logits.amax(dim=-1)
        token_ids = logits.argmax(dim=-1)
        for row in (peaks.isfinite() & torch.from_numpy(options.temperature > 0)).nonzero().flatten().tolist():
            token_ids[row] = _drawn(logits[row], options.part(row, row + 1))
        return ChosenTokens(token_ids, peaks)


def _drawn(logits: torch.Tensor, options: DrawOptions) -> int:
    """Draw one token. logits: [V], with a finite maximum. options: of one row."""
    scores = (logits - logits.max()) / float(options.temperature[0])
    ordered, order = scores.sort(descending=True, stable=True)
    likelihoods = scores.exp()
    likelihoods = likelihoods.where(likelihoods >= float(options.min_p[0]), 0.0)
    last = min(int(options.top_k[0]), len(scores)) - 1
    weights = (likelihoods * 2.0**40).long().where(scores >= ordered[last], 0)
    if options.top_p[0] < 1:
        reached = weights[order].cumsum(0) >= _share(int(weights.sum()), int(float(options.top_p[0]) * 2.0**62))
        weights = weights.where(scores >= ordered[int(reached.int().argmax())], 0)
    goal = _share(int(weights.sum()), int(options.fractions[0]))
    return int((weights.cumsum(0) <= goal).sum())


def _share(total: int, numerator: int) -> int:
    """Return floor(total * numerator / 2**62), in integers of any size."""
    return total * numerator >> 62


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x @ weight.float().T
    return product if bias is None else product + bias.float()


def _expert(x: torch.Tensor, weights: ExpertWeights, expert: int, activation: Activation) -> torch.Tensor:
    """Run one expert in float32. x: [N, C]. Returns [N, C]."""
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
    down_bias = None if weights.down_bias is None else weights.down_bias[expert]
    inner = _gated(_linear(x, weights.gate_up[expert], gate_up_bias), activation)
    return _linear(inner, weights.down[expert], down_bias)


def _quantized_expert(x: torch.Tensor, weights: QuantizedExperts, expert: int, activation: Activation) -> torch.Tensor:
    """Run one expert whose weights are integers. x: [N, C], float32. Returns [N, C], float32."""
    gate_up, down = expert_of(weights, expert)
    inner = _gated(quantized_product(x, gate_up, _entry(weights.gate_up_bias, expert)), activation)
    return quantized_product(inner, down, _entry(weights.down_bias, expert))


def _entry(stack: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if stack is None else stack[index]


def _turned(heads: torch.Tensor, turn: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of elements as complex numbers. turn: [T, 1, R], complex64."""
    size = turn.shape[-1]
    shape = (size, 2) if interleaved else (2, size)
    pairs = heads[..., : 2 * size].float().reshape(*heads.shape[:-1], *shape)
    axis = -1 if interleaved else -2
    turned = torch.complex(pairs.select(axis, 0), pairs.select(axis, 1)) * turn
    rotated = torch.stack((turned.real, turned.imag), dim=axis).flatten(-2)
    return torch.cat((rotated.to(heads.dtype), heads[..., 2 * size :]), dim=-1)


def _gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    # Not in two parts, which may differ by one and then be broadcast: an odd width gives three here.
    gate, up = torch.split(gate_up, gate_up.shape[-1] // 2, dim=-1)
    match activation:
        case Activation.SILU:
            return gate * torch.sigmoid(gate) * up
        case Activation.GELU:
            return 0.5 * gate * torch.erfc(gate * -math.sqrt(0.5)) * up
        case Activation.GELU_TANH:
            return gate * torch.sigmoid(math.sqrt(8 / math.pi) * (gate + 0.044715 * gate**3)) * up
        case Activation.SWIGLU_CLAMPED:
            gate, up = gate.clamp(max=_SWIGLU_LIMIT), up.clamp(-_SWIGLU_LIMIT, _SWIGLU_LIMIT)
            return gate * torch.sigmoid(_SWIGLU_ALPHA * gate) * (up + 1)
