"""The operators as nodes of torch's graphs, `zif_cpu::*`: what `torch.compile` sees in place of calls of the library.

A node runs what the `NativeOps` made last runs. `zif_cpu.operators` calls the functions below where a graph is traced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zif.contract import (
    Activation,
    ExpertWeights,
    NormOutput,
    QuantizedExperts,
    QuantizedWeight,
    RotatedHeads,
    RouterOutput,
    WeightScheme,
)

_nodes = torch.ops.zif_cpu


@dataclass(frozen=True, slots=True)
class Eager:
    """What the nodes run: the methods of `OpTable`, called at once. Results share no memory with arguments."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float], NormOutput]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool], RotatedHeads]
    gated_activation: Callable[[torch.Tensor, Activation], torch.Tensor]
    experts: Callable[[torch.Tensor, ExpertWeights, RouterOutput, Activation], torch.Tensor]
    quantized_linear: Callable[[torch.Tensor, QuantizedWeight, torch.Tensor | None], torch.Tensor]
    quantized_experts: Callable[[torch.Tensor, QuantizedExperts, RouterOutput, Activation], torch.Tensor]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = _nodes.linear(x, weight, bias)
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    normed: torch.Tensor = _nodes.rms_norm(x, weight, eps, weight_offset)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> NormOutput:
    normed, total = _nodes.add_rms_norm(x, residual, weight, eps, weight_offset)
    return NormOutput(normed, total)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> RotatedHeads:
    rotated_query, rotated_key = _nodes.rotate(query, key, cos, sin, interleaved)
    return RotatedHeads(rotated_query, rotated_key)


def gated_activation(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    y: torch.Tensor = _nodes.gated_activation(gate_up, activation.value)
    return y


def experts(x: torch.Tensor, weights: ExpertWeights, routed: RouterOutput, activation: Activation) -> torch.Tensor:
    held = [weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias]
    y: torch.Tensor = _nodes.experts(x, held, routed.weights, routed.expert_ids, activation.value)
    return y


def quantized_linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = _nodes.quantized_linear(x, *_parts(weight), _numbers(weight.scheme), bias)
    return y


def quantized_experts(
    x: torch.Tensor, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
) -> torch.Tensor:
    held = [*_parts(weights.gate_up), *_parts(weights.down), weights.gate_up_bias, weights.down_bias]
    schemes = [*_numbers(weights.gate_up.scheme), *_numbers(weights.down.scheme)]
    y: torch.Tensor = _nodes.quantized_experts(x, held, schemes, routed.weights, routed.expert_ids, activation.value)
    return y


def _parts(weight: QuantizedWeight) -> list[torch.Tensor | None]:
    return [weight.codes, weight.scales, weight.zeros]


def _numbers(scheme: WeightScheme) -> list[int]:
    """Return a scheme as numbers, which is how a node takes it; a group of 0 is none."""
    return [scheme.bits, scheme.group_size or 0, int(scheme.zero_points), int(scheme.dynamic_activations)]


def _weight(parts: Sequence[torch.Tensor | None], numbers: list[int]) -> QuantizedWeight:
    bits, group_size, zero_points, dynamic = numbers
    scheme = WeightScheme(bits, group_size or None, bool(zero_points), bool(dynamic))
    codes, scales, zeros = parts
    assert codes is not None, "a weight without codes"
    assert scales is not None, "a weight without scales"
    return QuantizedWeight(scheme, codes, scales, zeros)


class _Serving:
    """Whose operators the nodes run."""

    eager: Eager


_serving = _Serving()


def register(eager: Eager) -> None:
    """Let the nodes run `eager` from now on; the first caller makes them known to torch."""
    _serving.eager = eager
    if hasattr(_nodes, "linear"):
        return
    _register_projections()
    _register_norms()
    _register_rotation()
    _register_experts()
    _register_quantized()


def _register_projections() -> None:
    def multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _serving.eager.linear(x, weight, bias)

    def linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return _serving.eager.gated_activation(gate_up, Activation(activation))

    def gated_shape(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    _define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", multiplied, linear_shape)
    _define("gated_activation(Tensor gate_up, str activation) -> Tensor", gated, gated_shape)


def _register_norms() -> None:
    def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        return _serving.eager.rms_norm(x, weight, eps, weight_offset)

    def norm_shape(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        return x.new_empty(x.shape)

    def add(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = _serving.eager.add_rms_norm(x, residual, weight, eps, weight_offset)
        return output.normed, output.residual

    def add_shape(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    scales = "Tensor weight, float eps, float weight_offset"
    _define(f"rms_norm(Tensor x, {scales}) -> Tensor", normed, norm_shape)
    _define(f"add_rms_norm(Tensor x, Tensor residual, {scales}) -> (Tensor, Tensor)", add, add_shape)


def _register_rotation() -> None:
    def rotated(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = _serving.eager.rotate(query, key, cos, sin, interleaved)
        return heads.query, heads.key

    def rotated_shape(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape)

    heads = "Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved"
    _define(f"rotate({heads}) -> (Tensor, Tensor)", rotated, rotated_shape)


def _register_experts() -> None:
    def mixed(
        x: torch.Tensor, weights: list[torch.Tensor], shares: torch.Tensor, ids: torch.Tensor, activation: str
    ) -> torch.Tensor:
        return _serving.eager.experts(x, ExpertWeights(*weights), RouterOutput(shares, ids), Activation(activation))

    def mixed_shape(
        x: torch.Tensor, weights: list[torch.Tensor], shares: torch.Tensor, ids: torch.Tensor, activation: str
    ) -> torch.Tensor:
        return x.new_empty(x.shape)

    arguments = "Tensor x, Tensor?[] weights, Tensor shares, Tensor ids, str activation"
    _define(f"experts({arguments}) -> Tensor", mixed, mixed_shape)


def _register_quantized() -> None:
    def multiplied(
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        scheme: list[int],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return _serving.eager.quantized_linear(x, _weight([codes, scales, zeros], scheme), bias)

    def linear_shape(x: torch.Tensor, codes: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], codes.shape[0])

    def mixed(
        x: torch.Tensor,
        weights: list[torch.Tensor | None],
        schemes: list[int],
        shares: torch.Tensor,
        ids: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        gate_up, down = _weight(weights[:3], schemes[:4]), _weight(weights[3:6], schemes[4:])
        held = QuantizedExperts(gate_up, down, *weights[6:])
        return _serving.eager.quantized_experts(x, held, RouterOutput(shares, ids), Activation(activation))

    def mixed_shape(x: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_empty(x.shape)

    weight = "Tensor codes, Tensor scales, Tensor? zeros, int[] scheme"
    _define(f"quantized_linear(Tensor x, {weight}, Tensor? bias) -> Tensor", multiplied, linear_shape)
    arguments = "Tensor x, Tensor?[] weights, int[] schemes, Tensor shares, Tensor ids, str activation"
    _define(f"quantized_experts({arguments}) -> Tensor", mixed, mixed_shape)


def _define(schema: str, run: Callable[..., object], shape: Callable[..., object]) -> None:
    """Define one node: what runs for arrays of this process's memory, and what tells the shapes of its results."""
    name, parenthesis, arguments = schema.partition("(")
    qualified = f"zif_cpu::{name}"
    torch.library.define(qualified, parenthesis + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CPU", run)
    torch.library.register_fake(qualified, shape)
