"""The operators of a decoder layer that a platform may implement itself.

Shapes: T tokens, C channels, H heads, D head size, E experts, k experts per token. Arguments may have a strided first
axis, their other axes are dense. Every method returns a new array
or reuses an argument's storage only where it says so. `zif.reference` holds the executable semantics of each method;
a platform overrides the ones it is better at, and its plan reports the others as served by the reference.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from zif.contract.arrays import Array, HostArray
from zif.contract.quantization import QuantizedExperts, QuantizedWeight


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


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """How the next token of each of S rows is chosen: columns on the host, one entry per row.

    temperature: [S], float32; 0 takes the most likely token and ignores the other columns. min_p: [S], float32. top_k:
    [S], int64, at least the vocabulary size meaning no limit. top_p: [S], float64, 1 meaning no limit. fractions: [S],
    int64, random numerators over 2**62.
    """

    temperature: HostArray
    min_p: HostArray
    top_k: HostArray
    top_p: HostArray
    fractions: HostArray

    def part(self, begin: int, end: int) -> "DrawOptions":
        """Return the options of rows `begin` to `end - 1`."""
        columns = (self.temperature, self.min_p, self.top_k, self.top_p, self.fractions)
        return DrawOptions(*(column[begin:end] for column in columns))


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """token_ids: [S], int64. peaks: [S], float32, the largest logit of each row, NaN where the row has a NaN.

    The token of a row whose peak is not finite is void, and in the vocabulary.
    """

    token_ids: Array
    peaks: Array


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

    def gated_linear(
        self, x: Array, weight: Array | QuantizedWeight, bias: Array | None, activation: Activation
    ) -> Array:
        """Return `gated_activation` of x @ weight.T + bias, which a platform may do without keeping what is gated.

        x: [T, C]. weight: [2I, C], gate rows before up rows, or quantized, as `quantized_linear` takes it. bias: [2I].
        Returns [T, I], dtype of x. Whether what is gated is rounded to that dtype first is the platform's choice.
        """
        if isinstance(weight, QuantizedWeight):
            return self.gated_activation(self.quantized_linear(x, weight, bias), activation)
        return self.gated_activation(self.linear(x, weight, bias), activation)

    @abstractmethod
    def route(self, logits: Array, num_experts_per_token: int, routing: Routing) -> RouterOutput:
        """Choose experts for each token. logits: [T, E]."""

    @abstractmethod
    def experts(self, x: Array, weights: ExpertWeights, routed: RouterOutput, activation: Activation) -> Array:
        """Sum the chosen experts' outputs by their weights. x: [T, C]. Returns [T, C], dtype of x."""

    def quantized_linear(self, x: Array, weight: QuantizedWeight, bias: Array | None) -> Array:
        """Return x @ weight.T + bias, sums in float32 or exact integers. x: [T, I]. bias: [O], dtype of x.

        Called only where the device claims the feature of the weight's scheme. With dynamic activations token t is
        first rounded to codes round(x[t] / s), ties to even, s = max |x[t]| / 127 in float32, 1 for a row of zeros, and
        the product of codes is multiplied by both scales; x[t] with a NaN or an infinity gives a row of NaN. Returns
        [T, O], dtype of x. Dettmers et al., 2022 (vector-wise quantization).
        """
        raise NotImplementedError(f"{type(self).__name__} claims no weights of scheme {weight.scheme.name}")

    def quantized_experts(
        self, x: Array, weights: QuantizedExperts, routed: RouterOutput, activation: Activation
    ) -> Array:
        """Do what `experts` does, each product being a `quantized_linear`. x: [T, C]. Returns [T, C], dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} claims no experts of scheme {weights.gate_up.scheme.name}")

    def logits(self, hidden: Array, weight: Array, bias: Array | None) -> Array | None:
        """Do what `linear` does, in float32 without rounding to the dtype of hidden; None: core widens what it gives.

        hidden: [S, C]. weight: [V, C]. bias: [V], of one dtype. Returns [S, V], float32. A row depends on its hidden
        row alone, to the bit where `linear`'s rows do.
        """
        return None

    def quantized_logits(self, hidden: Array, weight: QuantizedWeight, bias: Array | None) -> Array | None:
        """Do what `logits` does with a quantized weight; None: core widens what `quantized_linear` gives.

        A row of hidden is rounded to codes as there, if at all; only the result is not rounded to the dtype of hidden.
        """
        return None

    def prepare_weight(self, weight: Array, allocate: Callable[[int], Array]) -> Array | None:
        """Return what `linear`, `gated_linear` and `logits` are given in place of a matrix, or None: the matrix itself.

        weight: [O, I], filled, of a floating dtype. Called once per matrix, when the model is loaded; nothing but those
        operators sees what is returned, and with it they give what they give with the matrix, to the bit. Core
        then overwrites the matrix or gives back its memory, unless something else reads it. allocate(num_bytes), within
        the call, lends device memory for as long as the model is there, [num_bytes], uint8, or raises
        `OutOfMemoryError`, which may be passed on: the matrix then stays, as with None, and what was lent goes back.
        """
        return None

    def choose_tokens(self, logits: Array, options: DrawOptions) -> ChosenTokens | None:
        """Choose the next token of each row on the device, or return None: core then uses the array library.

        logits: [S, V], float32, S at least 1. Does not wait for the device. A token's likelihood is exp((logit -
        largest logit) / temperature), in float32. min_p drops the tokens below it, then top_k those below the k-th most
        likely, then top_p those below the fewest most likely that hold the share p of the weight left; tokens that tie
        with the last one kept are kept. A token's weight is floor(2**40 * likelihood); the one drawn is the first at
        which the running sum of the kept weights exceeds floor(their total * fraction / 2**62). The most likely token
        is the lowest id among equals. A row's token depends on its row alone.
        """
        return None
