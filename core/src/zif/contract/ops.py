"""The operators of a decoder layer that a platform may implement itself.

Shapes: T tokens, C channels, H heads, D head size, E experts, k experts per token. Arguments may have a strided first
axis, their other axes are dense. Every method returns a new array
or reuses an argument's storage only where it says so. `zif.reference` holds the executable semantics of each method;
a platform overrides the ones it is better at, and its plan reports the others as served by the reference.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from zif.contract.arrays import Array


class Activation(StrEnum):
    """A gated activation: f(gate) * up.

    SWIGLU_CLAMPED is that of gpt-oss: gate and up clamped at 7, then (up + 1) * gate * sigmoid(1.702 * gate).
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLU_CLAMPED = "swiglu_clamped"


class Routing(StrEnum):
    """How router logits become expert weights.

    SOFTMAX_TOPK: softmax over all experts, the k best, as they are. SOFTMAX_TOPK_NORMALIZED: the same, divided by
    their sum. TOPK_SOFTMAX: the k best logits, softmax over those.
    """

    SOFTMAX_TOPK = "softmax_topk"
    SOFTMAX_TOPK_NORMALIZED = "softmax_topk_normalized"
    TOPK_SOFTMAX = "topk_softmax"


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """weights: [T, k], float32. expert_ids: [T, k], int64, distinct within a row, best first, ties to the lowest id."""

    weights: Array
    expert_ids: Array


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of all experts of one layer, model dtype.

    gate_up: [E, 2I, C], gate rows before up rows. down: [E, C, I]. The biases, where given: [E, 2I] and [E, C].
    """

    gate_up: Array
    down: Array
    gate_up_bias: Array | None = None
    down_bias: Array | None = None


@dataclass(frozen=True, slots=True)
class NormOutput:
    """normed: [T, C]. residual: [T, C], the sum that was normalized."""

    normed: Array
    residual: Array


@dataclass(frozen=True, slots=True)
class RotatedHeads:
    """query: [T, H, D]. key: [T, K, D]."""

    query: Array
    key: Array


class OpTable(ABC):
    """The operators, as methods."""

    @abstractmethod
    def linear(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """Return x @ weight.T + bias. x: [T, I]. weight: [O, I]. bias: [O]. Returns [T, O], dtype of x."""

    @abstractmethod
    def rms_norm(self, x: Array, weight: Array, eps: float, weight_offset: float) -> Array:
        """Scale x by 1 / rms over its last axis, computed in float32, times (weight + weight_offset).

        x: [..., C]. weight: [C]. Returns [..., C], dtype of x. Zhang and Sennrich, 2019.
        """

    @abstractmethod
    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float, weight_offset: float) -> NormOutput:
        """Add, then normalize: residual + x in the model dtype, then `rms_norm` of the sum. May reuse `residual`."""

    @abstractmethod
    def rotate(self, query: Array, key: Array, cos: Array, sin: Array, interleaved: bool) -> RotatedHeads:
        """Rotate the first 2 * R elements of each head by the angle of its token; leave the rest.

        query: [T, H, D]. key: [T, K, D]. cos, sin: [T, R], float32. Pairs are (i, i + R), or (2i, 2i + 1) when
        interleaved. Computed in float32, returned in the dtype of query. May reuse storage. Su et al., 2021.
        """

    @abstractmethod
    def gated_activation(self, gate_up: Array, activation: Activation) -> Array:
        """Return f(gate) * up. gate_up: [..., 2I], gate before up. Returns [..., I], dtype of gate_up."""

    @abstractmethod
    def route(self, logits: Array, num_experts_per_token: int, routing: Routing) -> RouterOutput:
        """Choose experts for each token. logits: [T, E]."""

    @abstractmethod
    def experts(self, x: Array, weights: ExpertWeights, routed: RouterOutput, activation: Activation) -> Array:
        """Sum the chosen experts' outputs by their weights. x: [T, C]. Returns [T, C], dtype of x."""
