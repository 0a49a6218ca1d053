"""The operators as nodes of torch's graphs, `zif_cpu::*`: what `torch.compile` sees in place of calls of the library.

A node runs what `NativeOps` runs. Registered once per process, as the library is loaded once. `zif_cpu.operators` calls
the functions below where a graph is being traced.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zif.contract import Activation, ExpertWeights, NormOutput, RotatedHeads, RouterOutput

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


def register(eager: Eager) -> None:
    """Make the nodes known to torch. Where they are known, the first caller's stay."""
    if hasattr(_nodes, "linear"):
        return
    _register_projections(eager)
    _register_norms(eager)
    _register_rotation(eager)
    _register_experts(eager)


def _register_projections(eager: Eager) -> None:
    def linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return eager.gated_activation(gate_up, Activation(activation))

    def gated_shape(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    _define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", eager.linear, linear_shape)
    _define("gated_activation(Tensor gate_up, str activation) -> Tensor", gated, gated_shape)


def _register_norms(eager: Eager) -> None:
    def norm_shape(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        return x.new_empty(x.shape)

    def add(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = eager.add_rms_norm(x, residual, weight, eps, weight_offset)
        return output.normed, output.residual

    def add_shape(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape)

    scales = "Tensor weight, float eps, float weight_offset"
    _define(f"rms_norm(Tensor x, {scales}) -> Tensor", eager.rms_norm, norm_shape)
    _define(f"add_rms_norm(Tensor x, Tensor residual, {scales}) -> (Tensor, Tensor)", add, add_shape)


def _register_rotation(eager: Eager) -> None:
    def rotated(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = eager.rotate(query, key, cos, sin, interleaved)
        return heads.query, heads.key

    def rotated_shape(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape)

    heads = "Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved"
    _define(f"rotate({heads}) -> (Tensor, Tensor)", rotated, rotated_shape)


def _register_experts(eager: Eager) -> None:
    def mixed(
        x: torch.Tensor, weights: list[torch.Tensor], shares: torch.Tensor, ids: torch.Tensor, activation: str
    ) -> torch.Tensor:
        return eager.experts(x, ExpertWeights(*weights), RouterOutput(shares, ids), Activation(activation))

    def mixed_shape(
        x: torch.Tensor, weights: list[torch.Tensor], shares: torch.Tensor, ids: torch.Tensor, activation: str
    ) -> torch.Tensor:
        return x.new_empty(x.shape)

    arguments = "Tensor x, Tensor?[] weights, Tensor shares, Tensor ids, str activation"
    _define(f"experts({arguments}) -> Tensor", mixed, mixed_shape)


def _define(schema: str, run: Callable[..., object], shape: Callable[..., object]) -> None:
    """Define one node: what runs for arrays of this process's memory, and what tells the shapes of its results."""
    name, parenthesis, arguments = schema.partition("(")
    qualified = f"zif_cpu::{name}"
    torch.library.define(qualified, parenthesis + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CPU", run)
    torch.library.register_fake(qualified, shape)
