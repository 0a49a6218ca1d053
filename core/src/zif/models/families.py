"""The families that the native decoder serves: from a configuration to a `DecoderSpec`.

One function per architecture, listed in `BUILDERS`; one more family is one more function and one more line. Defaults
for missing keys are those of the family's configuration class in transformers. No torch, no transformers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zif.contract import Activation, Routing
from zif.errors import ModelError, UnknownArchitectureError
from zif.models.config import ConfigReader
from zif.models.family_parts import (
    FULL,
    SLIDING,
    Defaults,
    activation,
    biased_attention,
    biased_mlp,
    decoder,
    gated_mlp,
    head_dim,
    listed_layer_types,
    num_layers,
    plain_attention,
    uniform_kinds,
    whole_head_rope,
    window_size,
)
from zif.models.heads import split_architecture
from zif.models.rope_config import partial_rotary_dim, read_rope, rope_section
from zif.models.spec import (
    DecoderSpec,
    ExpertTensors,
    LongRopeScaling,
    MlpSpec,
    MoeSpec,
    NormPlacement,
    QKNorm,
    RopeSpec,
)

_NOT_IMPLEMENTED = (
    "alibi",
    "attention_chunk_size",
    "attn_temperature_tuning",
    "clip_qkv",
    "dual_chunk_attention_config",
    "kv_lora_rank",
    "lm_head_bias",
    "logit_scale",
    "n_shared_experts",
    "rope_interleaved",
    "shared_expert_intermediate_size",
    "use_alibi",
    "use_bidirectional_attention",
    "use_mrope",
    "use_parallel_residual",
)
"""Keys known from configurations in the wild that change the computation and that no builder reads."""


def decoder_spec(architecture: str, config: Mapping[str, Any]) -> DecoderSpec:
    """Turn a configuration into the decoder it describes.

    Raises `UnknownArchitectureError` when the architecture, or a variant that it asks for, is not native, `ModelError`
    when the configuration is inconsistent.
    """
    named = split_architecture(architecture)
    builder = BUILDERS.get(named.family)
    if builder is None:
        raise UnknownArchitectureError(
            f"architecture {architecture!r} is not served by the native decoder; it serves {', '.join(BUILDERS)}"
        )
    reader = ConfigReader(config, f"config.json ({architecture})")
    reader.refuse_switched_on(_NOT_IMPLEMENTED)
    if config.get("is_causal") is False:
        raise ModelError(f"{reader.owner}: is_causal=False is not implemented; only causal decoders are served")
    return replace(builder(reader), head=named.head)


def _llama(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults()
    attention = biased_attention(config, defaults)
    return decoder(config, attention, biased_mlp(config), uniform_kinds(config, FULL), defaults)


def _mistral(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=8, window=4096)
    kind = FULL if window_size(config, defaults) is None else SLIDING
    attention = plain_attention(config, defaults)
    return decoder(config, attention, gated_mlp(config), uniform_kinds(config, kind), defaults)


def _qwen2(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=32, window=4096)
    attention = replace(plain_attention(config, defaults), qkv_bias=True)
    return decoder(config, attention, gated_mlp(config), _late_windows(config, defaults), defaults)


def _qwen3(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=32, head_dim=128, window=4096)
    attention = replace(biased_attention(config, defaults), qk_norm=QKNorm.PER_HEAD)
    return decoder(config, attention, gated_mlp(config), _late_windows(config, defaults), defaults)


def _late_windows(config: ConfigReader, defaults: Defaults) -> list[str]:
    """Give the layers from `max_window_layers` on a window, when windows are switched on at all."""
    windowed = config.flag("use_sliding_window", False) and window_size(config, defaults) is not None
    first = config.count_or_zero("max_window_layers", 28)
    kinds = [SLIDING if windowed and index >= first else FULL for index in range(num_layers(config))]
    return list(listed_layer_types(config, kinds))


def _qwen3_moe(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=4, window=4096)
    windowed = config.flag("use_sliding_window", False) and window_size(config, defaults) is not None
    attention = replace(biased_attention(config, defaults), qk_norm=QKNorm.PER_HEAD)
    kinds = uniform_kinds(config, SLIDING if windowed else FULL)
    spec = decoder(config, attention, _qwen3_experts(config), kinds, defaults)
    if not (set(range(len(spec.layers))) - _qwen3_sparse_layers(config)):
        return spec
    dense, sparse = gated_mlp(config), _qwen3_sparse_layers(config)
    layers = [layer if i in sparse else replace(layer, mlp=dense) for i, layer in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layers))


def _qwen3_sparse_layers(config: ConfigReader) -> set[int]:
    step, dense = config.count("decoder_sparse_step", 1), config.entries("mlp_only_layers") or ()
    return {index for index in range(num_layers(config)) if index not in dense and (index + 1) % step == 0}


def _qwen3_experts(config: ConfigReader) -> MoeSpec:
    return MoeSpec(
        num_experts=_num_experts(config, 128),
        num_experts_per_token=config.count("num_experts_per_tok", 8),
        intermediate_size=config.count("moe_intermediate_size", 768),
        routing=Routing.SOFTMAX_TOPK_NORMALIZED if config.flag("norm_topk_prob", False) else Routing.SOFTMAX_TOPK,
        activation=activation(config, "hidden_act", "silu"),
        tensors=ExpertTensors.GATE_UP_DOWN,
    )


def _num_experts(config: ConfigReader, default: int) -> int:
    """Read the number of experts: transformers 5 writes `num_local_experts` where older files say `num_experts`."""
    return config.count("num_experts" if config.has("num_experts") else "num_local_experts", default)


def _mixtral(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=8, rope_base=1e6, norm_eps=1e-5)
    moe = MoeSpec(
        num_experts=_num_experts(config, 8),
        num_experts_per_token=config.count("num_experts_per_tok", 2),
        intermediate_size=config.count("intermediate_size"),
        routing=Routing.SOFTMAX_TOPK_NORMALIZED,
        activation=activation(config, "hidden_act", "silu"),
        tensors=ExpertTensors.W1_W3_W2,
    )
    kind = FULL if window_size(config, defaults) is None else SLIDING
    return decoder(config, plain_attention(config, defaults), moe, uniform_kinds(config, kind), defaults)


_GEMMA = Defaults(num_kv_heads=4, head_dim=256, window=4096, tied_embeddings=True)


def _gemma2(config: ConfigReader) -> DecoderSpec:
    attention = replace(
        biased_attention(config, _GEMMA),
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        softcap=_softcap(config, "attn_logit_softcapping", 50.0),
    )
    kinds = [FULL if index % 2 else SLIDING for index in range(num_layers(config))]
    spec = decoder(config, attention, _gemma_mlp(config), listed_layer_types(config, kinds), _GEMMA)
    return _gemma(replace(spec, final_softcap=_softcap(config, "final_logit_softcapping", 30.0)))


def _gemma3(config: ConfigReader) -> DecoderSpec:
    # transformers reads this key of Gemma 3 but does not apply it: whichever was meant, do not guess.
    config.refuse_switched_on(("attn_logit_softcapping",))
    pattern = config.count("sliding_window_pattern", config.count("_sliding_window_pattern", 6))
    kinds = [SLIDING if (index + 1) % pattern else FULL for index in range(num_layers(config))]
    bias = config.flag("attention_bias", False)
    attention = replace(
        plain_attention(config, _GEMMA, _gemma3_rope(config, FULL)),
        scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        qk_norm=QKNorm.PER_HEAD,
        qkv_bias=bias,
        output_bias=bias,
    )
    spec = decoder(config, attention, _gemma_mlp(config), listed_layer_types(config, kinds), _GEMMA)
    local = _gemma3_rope(config, SLIDING)
    layers = [
        layer if layer.attention.window is None else replace(layer, attention=replace(layer.attention, rope=local))
        for layer in spec.layers
    ]
    softcap = config.optional_number("final_logit_softcapping")
    return _gemma(replace(spec, layers=tuple(layers), final_softcap=softcap))


def _gemma3_rope(config: ConfigReader, kind: str) -> RopeSpec:
    """Read the rotation of one layer type: nested, or the old keys, whose scaling is of the global layers alone."""
    nested = config.section("rope_parameters")
    if nested is not None:
        section = nested.section(kind)
    else:
        section = config.section("rope_scaling") if kind == FULL else None
    base = config.number("rope_theta", 1e6) if kind == FULL else config.number("rope_local_base_freq", 1e4)
    empty = ConfigReader({}, config.owner)
    return whole_head_rope(config, section or empty, head_dim(config, _GEMMA), base)


def _gemma_mlp(config: ConfigReader) -> MlpSpec:
    return MlpSpec(config.count("intermediate_size"), activation(config, "hidden_activation", "gelu_pytorch_tanh"))


def _gemma(spec: DecoderSpec) -> DecoderSpec:
    return replace(
        spec,
        norm_placement=NormPlacement.SANDWICH,
        norm_weight_offset=1.0,
        embedding_multiplier=spec.hidden_size**0.5,
        rounds_embedding_multiplier=True,
    )


def _softcap(config: ConfigReader, key: str, default: float) -> float | None:
    """Read a soft cap: null says none, a missing key the default."""
    return config.optional_number(key) if key in config.values else default


def _phi3(config: ConfigReader) -> DecoderSpec:
    defaults, section = Defaults(norm_eps=1e-5), rope_section(config)
    rotary_dim = partial_rotary_dim(config, section, head_dim(config, defaults))
    rope = read_rope(config, section, rotary_dim, config.number("rope_theta", defaults.rope_base))
    if rope.scaling is not None and not isinstance(rope.scaling, LongRopeScaling):
        raise UnknownArchitectureError(
            f"{section.owner}: {dict(section.values)!r} is not implemented for this architecture, which knows "
            "'default' and 'longrope'; use implementation='transformers'"
        )
    kind = FULL if window_size(config, defaults) is None else SLIDING
    attention = plain_attention(config, defaults, rope)
    return decoder(config, attention, gated_mlp(config), uniform_kinds(config, kind), defaults)


def _olmo2(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(norm_eps=1e-5)
    attention = replace(biased_attention(config, defaults), qk_norm=QKNorm.FULL_WIDTH)
    spec = decoder(config, attention, gated_mlp(config), uniform_kinds(config, FULL), defaults)
    return replace(spec, norm_placement=NormPlacement.POST)


def _smollm3(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults(num_kv_heads=4, rope_base=2e6, tied_embeddings=True)
    rotates = _smollm3_rotates(config)
    windowed = config.flag("use_sliding_window", False) and window_size(config, defaults) is not None
    kinds = listed_layer_types(config, [SLIDING if windowed and not rotate else FULL for rotate in rotates])
    spec = decoder(config, biased_attention(config, defaults), biased_mlp(config), kinds, defaults)
    layers = tuple(
        layer if rotate else replace(layer, attention=replace(layer.attention, rope=None))
        for layer, rotate in zip(spec.layers, rotates, strict=True)
    )
    return replace(spec, layers=layers)


def _smollm3_rotates(config: ConfigReader) -> list[bool]:
    """Say for each layer whether it has positions: `no_rope_layers` holds 1 where it has."""
    interval = config.count("no_rope_layer_interval", 4)
    listed = config.entries("no_rope_layers")
    if listed is None:
        return [(index + 1) % interval != 0 for index in range(num_layers(config))]
    if len(listed) < num_layers(config):
        raise config.wrong("no_rope_layers", f"a list of at least num_hidden_layers={num_layers(config)} entries")
    return [bool(entry) for entry in listed[: num_layers(config)]]


def _granite(config: ConfigReader) -> DecoderSpec:
    defaults = Defaults()
    attention = replace(biased_attention(config, defaults), scale=config.number("attention_multiplier", 1.0))
    return replace(
        decoder(config, attention, biased_mlp(config), uniform_kinds(config, FULL), defaults),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
    )


_GPT_OSS_ROPE = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)


def _gpt_oss(config: ConfigReader) -> DecoderSpec:
    for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.number(key, only) != only:
            raise config.wrong(key, f"{only}, the only value that is implemented")
    defaults = Defaults(num_kv_heads=8, head_dim=64, rope_base=150000.0, norm_eps=1e-5, window=128, attention_bias=True)
    if not rope_section(config).values:
        config = ConfigReader({**config.values, "rope_scaling": dict(_GPT_OSS_ROPE)}, config.owner)
    kinds = [FULL if index % 2 else SLIDING for index in range(num_layers(config))]
    attention = replace(biased_attention(config, defaults), sinks=True)
    return decoder(config, attention, _gpt_oss_experts(config), listed_layer_types(config, kinds), defaults)


def _gpt_oss_experts(config: ConfigReader) -> MoeSpec:
    return MoeSpec(
        num_experts=_num_experts(config, 128),
        num_experts_per_token=config.count("num_experts_per_tok", 4),
        intermediate_size=config.count("intermediate_size"),
        routing=Routing.TOPK_SOFTMAX,
        activation=Activation.SWIGLU_CLAMPED,
        tensors=ExpertTensors.INTERLEAVED,
        router_bias=True,
        expert_bias=True,
    )


BUILDERS: Mapping[str, Callable[[ConfigReader], DecoderSpec]] = MappingProxyType(
    {
        "LlamaForCausalLM": _llama,
        "MistralForCausalLM": _mistral,
        "Qwen2ForCausalLM": _qwen2,
        "Qwen3ForCausalLM": _qwen3,
        "Qwen3MoeForCausalLM": _qwen3_moe,
        "MixtralForCausalLM": _mixtral,
        "Gemma2ForCausalLM": _gemma2,
        "Gemma3ForCausalLM": _gemma3,
        "Phi3ForCausalLM": _phi3,
        "Olmo2ForCausalLM": _olmo2,
        "SmolLM3ForCausalLM": _smollm3,
        "GraniteForCausalLM": _granite,
        "GptOssForCausalLM": _gpt_oss,
    }
)
"""Native architectures, as `architectures` of a configuration names them; `zif.models.heads` knows other heads."""
