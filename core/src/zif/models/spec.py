"""What a decoder is made of, as values.

A family turns its configuration into one `DecoderSpec`; the tensor layout, the memory figures and the decoder itself
are driven by that value alone. No torch here, nothing is read from disk, and no value mentions a model by name.

Letters: C hidden channels, H query heads, K key/value heads, D head size, I intermediate channels, E experts.
"""

from dataclasses import dataclass
from enum import StrEnum

from zif.contract import Activation, Routing
from zif.models.heads import Head


class NormPlacement(StrEnum):
    """Where a layer normalizes.

    PRE: the input of attention and of the MLP (Llama). POST: their outputs, before the residual sum (OLMo 2).
    SANDWICH: both (Gemma 2).
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"


class QKNorm(StrEnum):
    """How queries and keys are normalized before rotation.

    PER_HEAD: over each head's D elements, one weight for all heads. FULL_WIDTH: over all heads at once.
    """

    NONE = "none"
    PER_HEAD = "per_head"
    FULL_WIDTH = "full_width"


class ExpertTensors(StrEnum):
    """How a checkpoint names and stores experts.

    GATE_UP_DOWN: `mlp.experts.N.{gate,up,down}_proj.weight`. W1_W3_W2: `block_sparse_moe.experts.N.{w1,w3,w2}.weight`.
    INTERLEAVED: all experts in one tensor, input channels first, gate and up alternating (gpt-oss), or the same packed
    as MXFP4 blocks.
    """

    GATE_UP_DOWN = "gate_up_down"
    W1_W3_W2 = "w1_w3_w2"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor`. Chen et al., 2023."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by `factor`, high ones kept, a ramp between. Llama 3.1 model card."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies interpolated by how often they turn within the original length. Peng et al., 2023.

    `attention_factor` multiplies cosine and sine. `truncate` rounds the ramp's ends to whole dimensions.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """One divisor per frequency, from one of two lists. Ding et al., 2024.

    `long_factors` serve a model that may run past `original_max_position`, `short_factors` one that may not: rotated
    keys stay in the KV cache, so the choice is made once and not per sequence.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions: the first `rotary_dim` elements of each head, frequencies base ** (-2i / rotary_dim)."""

    base: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention of one layer. `rope` is None in a layer without positions; `window` None sees everything."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE

    @property
    def query_size(self) -> int:
        """H * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """K * D."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A gated MLP: down(activation(gate, up))."""

    intermediate_size: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of gated MLPs, `num_experts_per_token` of `num_experts` for each token."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    routing: Routing
    activation: Activation
    tensors: ExpertTensors
    router_bias: bool = False
    expert_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec
    mlp: MlpSpec | MoeSpec


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only model.

    A norm multiplies by weight + `norm_weight_offset`. Embeddings are multiplied by `embedding_multiplier`, which is
    first rounded to the model dtype when `rounds_embedding_multiplier` (Gemma). What attention and MLP give is
    multiplied by `residual_multiplier`; logits are divided by `logits_divisor`, then capped at `final_softcap`.
    `max_position` is the longest sequence that the configuration allows, `default_max_len` what is served unless the
    user asks for more. Without an output matrix (`head`) `tied_embeddings` has no meaning.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_position: int
    tied_embeddings: bool
    norm_placement: NormPlacement = NormPlacement.PRE
    norm_weight_offset: float = 0.0
    embedding_multiplier: float = 1.0
    rounds_embedding_multiplier: bool = False
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    final_softcap: float | None = None
    head: Head = Head.TOKENS

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary embeddings, in the order of first use."""
        return tuple(dict.fromkeys(layer.attention.rope for layer in self.layers if layer.attention.rope is not None))

    @property
    def interleaves_experts(self) -> bool:
        """Say whether experts are stored in one tensor with gate and up alternating, which may be packed as MXFP4."""
        tensors = (layer.mlp.tensors for layer in self.layers if isinstance(layer.mlp, MoeSpec))
        return ExpertTensors.INTERLEAVED in tensors

    @property
    def default_max_len(self) -> int:
        """Tokens: the original length where a longer one would change how short sequences are computed (LongRoPE)."""
        originals = [r.scaling.original_max_position for r in self.ropes if isinstance(r.scaling, LongRopeScaling)]
        return min([self.max_position, *originals])
