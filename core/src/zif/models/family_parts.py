"""The parts that families share: attention, MLP and layer lists read from a configuration.

Used by the builders in `zif.models.families` only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from zif.contract import Activation
from zif.errors import ModelError, UnknownArchitectureError
from zif.models.config import ConfigReader
from zif.models.rope_config import read_rope, rope_section
from zif.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, MoeSpec, RopeSpec, YarnScaling

FULL, SLIDING = "full_attention", "sliding_attention"

_ACTIVATIONS = MappingProxyType(
    {
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu": Activation.GELU,
        "gelu_new": Activation.GELU_TANH,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
    }
)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a family assumes for missing keys.

    `num_kv_heads` None means as many as query heads, `head_dim` None means hidden size / query heads, `window` None
    means no window. `attention_bias` is of all four projections.
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    window: int | None = None
    tied_embeddings: bool = False
    attention_bias: bool = False


def num_layers(config: ConfigReader) -> int:
    """Read the number of decoder layers."""
    return config.count("num_hidden_layers")


def head_dim(config: ConfigReader, defaults: Defaults) -> int:
    """Read the size of an attention head, or derive it."""
    if config.has("head_dim") or defaults.head_dim is not None:
        return config.count("head_dim", defaults.head_dim)
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    if hidden % heads:
        raise config.wrong("num_attention_heads", f"a divisor of hidden_size={hidden}, as head_dim is not given")
    return hidden // heads


def plain_attention(config: ConfigReader, defaults: Defaults, rope: RopeSpec | None = None) -> AttentionSpec:
    """Read attention without biases; `rope` replaces the rotation of whole heads that the configuration describes."""
    size, heads = head_dim(config, defaults), config.count("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", defaults.num_kv_heads or heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    if rope is None:
        rope = whole_head_rope(config, rope_section(config), size, config.number("rope_theta", defaults.rope_base))
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=size, scale=size**-0.5, rope=rope)


def biased_attention(config: ConfigReader, defaults: Defaults) -> AttentionSpec:
    """Read attention whose four projections have a bias when `attention_bias` says so."""
    bias = config.flag("attention_bias", defaults.attention_bias)
    return replace(plain_attention(config, defaults), qkv_bias=bias, output_bias=bias)


def whole_head_rope(config: ConfigReader, section: ConfigReader, size: int, base: float) -> RopeSpec:
    """Read a rotation of whole heads of `size` elements."""
    for owner in (config, section):
        owner.refuse_switched_on(("partial_rotary_factor",))
    if size % 2:
        raise config.wrong("head_dim", f"even for rotary positions, but it is {size}")
    return read_rope(config, section, size, base)


def activation(config: ConfigReader, key: str, default: str) -> Activation:
    """Read the function of a gated MLP."""
    name = config.text(key, default)
    if name not in _ACTIVATIONS:
        raise UnknownArchitectureError(
            f"{config.owner}: {key}={name!r} is not implemented by the native decoder, which knows "
            f"{sorted(_ACTIVATIONS)}; use implementation='transformers'"
        )
    return _ACTIVATIONS[name]


def gated_mlp(config: ConfigReader) -> MlpSpec:
    """Read a gated MLP without biases."""
    return MlpSpec(config.count("intermediate_size"), activation(config, "hidden_act", "silu"))


def biased_mlp(config: ConfigReader) -> MlpSpec:
    """Read a gated MLP whose projections have a bias when `mlp_bias` says so."""
    return replace(gated_mlp(config), bias=config.flag("mlp_bias", False))


def window_size(config: ConfigReader, defaults: Defaults) -> int | None:
    """Read the sliding window in tokens: null says none, a missing key the family's default."""
    return config.optional_count("sliding_window") if "sliding_window" in config.values else defaults.window


def listed_layer_types(config: ConfigReader, otherwise: Sequence[str]) -> Sequence[str]:
    """Read `layer_types` where the configuration has them, for a family that lets it choose."""
    kinds = config.entries("layer_types")
    return otherwise if kinds is None else kinds


def decoder(
    config: ConfigReader, attention: AttentionSpec, mlp: MlpSpec | MoeSpec, kinds: Sequence[str], defaults: Defaults
) -> DecoderSpec:
    """Build a decoder whose layers differ at most in whether they have the window.

    `kinds` holds one layer type per layer. Raises `ModelError` when `layer_types` of the configuration disagrees.
    """
    _check_layer_types(config, kinds)
    window = window_size(config, defaults)
    if window is None and SLIDING in kinds:
        raise config.wrong("sliding_window", "the window of the layers of type 'sliding_attention'")
    layers = tuple(
        LayerSpec(replace(attention, window=window if kind == SLIDING else attention.window), mlp) for kind in kinds
    )
    return DecoderSpec(
        vocab_size=config.count("vocab_size"),
        hidden_size=config.count("hidden_size"),
        layers=layers,
        norm_eps=config.number("rms_norm_eps", defaults.norm_eps),
        max_position=_max_position(config, attention.rope),
        tied_embeddings=config.flag("tie_word_embeddings", defaults.tied_embeddings),
    )


def _max_position(config: ConfigReader, rope: RopeSpec | None) -> int:
    """Read the longest sequence; YaRN added by hand to a configuration extends what that configuration says."""
    stated = config.count("max_position_embeddings")
    if rope is None or not isinstance(rope.scaling, YarnScaling):
        return stated
    return max(stated, int(rope.scaling.original_max_position * rope.scaling.factor))


def uniform_kinds(config: ConfigReader, kind: str) -> list[str]:
    """Give every layer the same type."""
    return [kind] * num_layers(config)


def _check_layer_types(config: ConfigReader, kinds: Sequence[str]) -> None:
    unknown = sorted({str(kind) for kind in kinds} - {FULL, SLIDING})
    if unknown:
        raise UnknownArchitectureError(
            f"{config.owner}: layer type {unknown[0]!r} is not implemented by the native decoder, which knows "
            f"{FULL!r} and {SLIDING!r}; use implementation='transformers'"
        )
    if len(kinds) != num_layers(config):
        raise config.wrong("layer_types", f"a list of num_hidden_layers={num_layers(config)} entries")
    listed = config.entries("layer_types")
    if listed is not None and tuple(listed) != tuple(kinds):
        raise ModelError(
            f"{config.owner}: layer_types={list(listed)!r} contradicts what this architecture computes, "
            f"{list(kinds)!r}; correct config.json"
        )
