"""What a model needs of a platform, from its configuration and file headers alone.

No weight is read and, for native models, no array library is imported. Called by the engine before planning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from zif.contract import Feature, FullAttentionSpec, KVSpec, ModelDescription, SlidingWindowSpec
from zif.errors import ConfigError, ModelError, UnknownArchitectureError
from zif.models.checkpoint import Checkpoint, open_decoder_checkpoint
from zif.models.config import load_config
from zif.models.families import BUILDERS, decoder_spec
from zif.models.heads import Head, bare_architecture, split_architecture
from zif.models.held import Layout
from zif.models.layout import LM_HEAD, plan_layout
from zif.models.pooling import MODULES_FILE
from zif.models.quantization.plan import ROUNDINGS, read_quantization
from zif.models.spec import AttentionSpec, DecoderSpec, LayerSpec, MoeSpec

MODEL_DTYPES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
"""Dtypes in which weights can be held, and the bytes of an element."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model to serve, and how.

    `dtype` "auto" is the checkpoint's own. `max_model_len` None is what the configuration allows. "auto" picks the
    native decoder where it knows the architecture, else the generic backend. `kv_dtype` "auto" is the dtype of the
    weights. `quantization` is what weights are rounded to on load, one of `ROUNDINGS`; None leaves them as stored.
    """

    path: Path
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    implementation: Literal["auto", "native", "transformers"] = "auto"
    trust_remote_code: bool = False
    kv_dtype: str = "auto"
    quantization: str | None = None


def describe_model(source: ModelSource) -> ModelDescription:
    """Describe the model at `source`.

    Raises `CheckpointError` when files are missing, unsound or do not fit, `UnknownArchitectureError` when nothing
    serves the architecture, `ModelError` on an inconsistent configuration, `ConfigError` on a wrong setting.
    """
    if source.dtype not in ("auto", *MODEL_DTYPES):
        raise ConfigError(f"dtype={source.dtype!r} is not served; use 'auto' or one of {', '.join(MODEL_DTYPES)}")
    if source.block_size < 1:
        raise ConfigError(f"block_size={source.block_size!r} must be at least 1")
    if source.quantization is not None and source.quantization not in ROUNDINGS:
        raise ConfigError(f"quantization={source.quantization!r} is not served; use one of {', '.join(ROUNDINGS)}")
    config = load_config(source.path)
    architecture = architecture_of(config)
    if source.implementation == "transformers":
        return _describe_generic(source, config, architecture)
    if source.implementation == "native" or split_architecture(architecture).family in BUILDERS:
        return _describe_native(source, config, architecture)
    return _describe_generic(source, config, architecture)


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the one architecture that a configuration names."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures={names!r} must name exactly one class; correct config.json")
    return names[0]


def resolve_dtype(source: ModelSource, config: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Choose the dtype that weights are held in: the one asked for, the configuration's, or the one mostly stored."""
    if source.dtype != "auto":
        return source.dtype
    named = config.get("dtype", config.get("torch_dtype"))
    if named is None:
        return _stored_dtype(checkpoint)
    dtype = str(named).removeprefix("torch.")
    if dtype not in MODEL_DTYPES:
        raise ModelError(
            f"config.json: dtype={named!r} is not served; ask for one of {', '.join(MODEL_DTYPES)} instead of 'auto'"
        )
    return dtype


def resolve_kv_dtype(source: ModelSource, dtype: str) -> str:
    """Choose the dtype of keys and values of a model whose weights are held in `dtype`."""
    return dtype if source.kv_dtype == "auto" else source.kv_dtype


def resolve_max_model_len(source: ModelSource, longest: int, default: int) -> int:
    """Choose the longest sequence to serve. Raises `ConfigError` when more is asked for than the model has."""
    asked = source.max_model_len
    if asked is None:
        return default
    if asked < 1:
        raise ConfigError(f"max_model_len={asked!r} must be at least 1")
    if asked > longest:
        raise ConfigError(
            f"max_model_len={asked!r} exceeds the {longest} positions that config.json of {str(source.path)!r} allows; "
            f"ask for at most {longest}"
        )
    return asked


def _describe_native(source: ModelSource, config: dict[str, Any], architecture: str) -> ModelDescription:
    spec = decoder_spec(architecture, config)
    quantization = read_quantization(config, source.quantization, spec)
    checkpoint = open_decoder_checkpoint(source.path)
    if _leaves_out_the_output_matrix(spec, checkpoint):
        # Known ones name the class that they were trained as. Loading and pooling go by the description's name.
        architecture, spec = bare_architecture(architecture), replace(spec, head=Head.NONE)
    layout = plan_layout(spec, checkpoint, quantization)
    dtype = resolve_dtype(source, config, checkpoint)
    element_bytes = MODEL_DTYPES[dtype]
    return ModelDescription(
        path=source.path,
        architecture=architecture,
        implementation="native",
        config=config,
        dtype=dtype,
        vocab_size=spec.vocab_size,
        max_model_len=resolve_max_model_len(source, spec.max_position, spec.default_max_len),
        kv_specs=_kv_specs(spec, source.block_size, resolve_kv_dtype(source, dtype)),
        features=_features(spec, layout),
        weight_bytes=layout.num_bytes(element_bytes),
        token_activation_bytes=_token_activation_bytes(spec, element_bytes),
        sample_activation_bytes=_sample_activation_bytes(spec, element_bytes),
        quantization=source.quantization,
        weight_schemes=tuple(dict.fromkeys(scheme.name for scheme in layout.schemes)),
    )


def _leaves_out_the_output_matrix(spec: DecoderSpec, checkpoint: Checkpoint) -> bool:
    """Say whether a language model was saved without it on purpose, as embedding models are.

    Its tensors have the names of a decoder alone, or the folder is one of sentence-transformers. A checkpoint that
    lacks it and is neither is incomplete.
    """
    module = LM_HEAD.removesuffix("weight")
    if spec.head is not Head.TOKENS or spec.tied_embeddings or any(n.startswith(module) for n in checkpoint.tensors):
        return False
    is_bare = any(tensor.name != name for name, tensor in checkpoint.tensors.items())
    return is_bare or (checkpoint.folder / MODULES_FILE).is_file()


def _describe_generic(source: ModelSource, config: dict[str, Any], architecture: str) -> ModelDescription:
    if split_architecture(architecture).head is not Head.TOKENS:
        raise UnknownArchitectureError(
            f"architecture {architecture!r} has no output matrix of a language model; without one the native decoder "
            f"serves decoders of these families, bare or with a score head, and no encoders: {', '.join(BUILDERS)}"
        )
    if source.quantization is not None:
        raise ConfigError(
            f"quantization={source.quantization!r} is served by native decoders only, and {architecture!r} runs "
            "through the transformers backend; leave it out, or choose a model of a native architecture"
        )
    try:
        from zif.models import transformers_backend
    except ImportError as error:
        raise UnknownArchitectureError(
            f"architecture {architecture!r} is not served by the native decoder (it serves {', '.join(BUILDERS)}), and "
            f"the transformers backend is not available: {error}; install zif[transformers]"
        ) from error
    try:
        return transformers_backend.describe(source, config)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(
            f"neither the native decoder (it serves {', '.join(BUILDERS)}) nor the transformers backend serves "
            f"{architecture!r}: {error}"
        ) from error


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype of most stored bytes that weights can be held in."""
    num_bytes = dict.fromkeys(MODEL_DTYPES, 0)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in num_bytes:
            num_bytes[tensor.dtype] += tensor.num_bytes
    return max(num_bytes, key=lambda dtype: num_bytes[dtype])


def _kv_specs(spec: DecoderSpec, block_size: int, dtype: str) -> tuple[KVSpec, ...]:
    """Group the layers that keep the same state: full attention first, then by window."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        attention = layer.attention
        key = (attention.window or 0, attention.num_kv_heads, attention.head_dim)
        groups.setdefault(key, []).append(index)
    return tuple(_kv_spec(key, tuple(layers), block_size, dtype) for key, layers in sorted(groups.items()))


def _kv_spec(key: tuple[int, int, int], layers: tuple[int, ...], block_size: int, dtype: str) -> KVSpec:
    window, num_kv_heads, head_dim = key
    if window:
        return SlidingWindowSpec(layers, num_kv_heads, head_dim, block_size, dtype, window)
    return FullAttentionSpec(layers, num_kv_heads, head_dim, block_size, dtype)


def _features(spec: DecoderSpec, layout: Layout) -> frozenset[Feature]:
    attentions = [layer.attention for layer in spec.layers]
    needed = {
        Feature.ATTENTION_FULL: any(a.window is None for a in attentions),
        Feature.ATTENTION_SLIDING_WINDOW: any(a.window is not None for a in attentions),
        Feature.ATTENTION_SOFTCAP: any(a.softcap is not None for a in attentions),
        Feature.ATTENTION_SINKS: any(a.sinks for a in attentions),
        Feature.MIXTURE_OF_EXPERTS: any(isinstance(layer.mlp, MoeSpec) for layer in spec.layers),
        Feature.QUANTIZATION_MXFP4_DEQUANTIZED: layout.is_packed,
    }
    schemes = {scheme.feature for scheme in layout.schemes}
    return frozenset(feature for feature, is_needed in needed.items() if is_needed) | schemes


def _token_activation_bytes(spec: DecoderSpec, element_bytes: int) -> int:
    """Estimate the peak working memory of one token of a step.

    The residual stream, its normed copy and the update (3C) live throughout. Beside them stands the wider of attention
    (qkv, rotated query and key, output: (3H + 3K) * D) and MLP (gate and up, their product: 3I; a mixture of experts
    holds k of those and k inputs and outputs of C), counted with one float32 copy for operators that widen. Angles
    take 4 bytes per rotated element and distinct rotation.
    """
    layer_elements = max(_layer_elements(spec, layer) for layer in spec.layers)
    angles = sum(4 * rope.rotary_dim for rope in spec.ropes)
    return (3 * spec.hidden_size + layer_elements) * (element_bytes + 4) + angles


def _layer_elements(spec: DecoderSpec, layer: LayerSpec) -> int:
    mlp = layer.mlp
    if isinstance(mlp, MoeSpec):
        mlp_elements = mlp.num_experts + mlp.num_experts_per_token * (3 * mlp.intermediate_size + 2 * spec.hidden_size)
    else:
        mlp_elements = 3 * mlp.intermediate_size
    return max(_attention_elements(layer.attention), mlp_elements)


def _attention_elements(attention: AttentionSpec) -> int:
    return 3 * (attention.query_size + attention.kv_size)


def _sample_activation_bytes(spec: DecoderSpec, element_bytes: int) -> int:
    """Estimate the working memory of one sampled row: its hidden state, logits in the model dtype and in float32, and
    two float32 copies that sampling makes (adjusted logits, probabilities)."""
    return spec.hidden_size * element_bytes + spec.vocab_size * (element_bytes + 3 * 4)
