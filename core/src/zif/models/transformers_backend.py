"""Models of the transformers package, served over zif's paged attention.

Any architecture of `AutoModelForCausalLM` can be served whose layers ask transformers' attention registry, or keep
recurrent state in transformers' cache; what stands in the way is found when planning and refused by name. Not the fast
path: each layer runs as transformers wrote it. `describe` is called when planning, `load_transformers_model` by the
torch runner. transformers is imported on first use only.
"""

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from zif.contract import (
    Feature,
    FullAttentionSpec,
    KVSpec,
    ModelDescription,
    RecurrentStateSpec,
    SlidingWindowSpec,
    StateTensor,
)
from zif.errors import ConfigError, UnknownArchitectureError
from zif.models.checkpoint import open_checkpoint
from zif.models.description import ModelSource, resolve_dtype, resolve_kv_dtype, resolve_max_model_len
from zif.models.transformers_attention import TRACED_ATTENTION, TRACED_EXPERTS, register
from zif.models.transformers_model import load_transformers_model
from zif.models.transformers_parts import SplitModel, find_decoder_path
from zif.models.transformers_trace import Trace, TracedConfig, TracedLayer, TracedState, trace

__all__ = ["describe", "load_transformers_model"]

MIN_VERSION = (5, 10)
_BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError)
_LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


def describe(source: ModelSource, config: dict[str, Any]) -> ModelDescription:
    """Say what the checkpoint needs of a platform when transformers runs it.

    `config` is the checkpoint's `config.json`. Reads no weight. Raises `UnknownArchitectureError` with the reason when
    the architecture cannot be served, `CheckpointError` on unsound files, `ConfigError` on a setting it does not serve.
    """
    _require_transformers()
    hf_config = _load_config(source, config)
    text_config = hf_config.get_text_config()
    max_position = getattr(text_config, "max_position_embeddings", None)
    traced_config = TracedConfig(
        architecture=_architecture(config),
        num_layers=text_config.num_hidden_layers,
        layer_types=tuple(getattr(text_config, "layer_types", None) or ()),
        horizon=max_position or source.max_model_len or 0,
    )
    dtype_name = resolve_dtype(source, config, open_checkpoint(source.path))
    dtype: torch.dtype = getattr(torch, dtype_name)
    model = _build_without_weights(hf_config, source, dtype, traced_config)
    traced = trace(model, traced_config)
    if source.kv_dtype != "auto" and not traced.layers:
        raise ConfigError(
            f"kv_cache_dtype={source.kv_dtype!r} has no meaning for {traced_config.architecture!r}, which keeps states "
            "and no keys and values; leave it out"
        )
    return ModelDescription(
        path=source.path,
        architecture=traced_config.architecture,
        implementation="transformers",
        config=config,
        dtype=dtype_name,
        vocab_size=traced.num_logits,
        max_model_len=_max_model_len(source, text_config, max_position),
        kv_specs=(
            *_kv_specs(traced.layers, source.block_size, resolve_kv_dtype(source, dtype_name)),
            *_state_specs(traced.states, source.block_size, dtype_name),
        ),
        features=_features(traced),
        weight_bytes=_weight_bytes(model, dtype),
        token_activation_bytes=traced.token_activation_bytes,
        # A request has one row of logits, so what its states take while a layer runs is counted with it.
        sample_activation_bytes=traced.sample_activation_bytes + 2 * max(map(_state_bytes, traced.states), default=0),
        trust_remote_code=source.trust_remote_code,
    )


def _require_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise UnknownArchitectureError(
            "the transformers backend needs the transformers package, which is not installed: "
            "pip install 'zif[transformers]'"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if version < MIN_VERSION:
        raise UnknownArchitectureError(
            f"the transformers backend needs transformers {MIN_VERSION[0]}.{MIN_VERSION[1]} or later, "
            f"{transformers.__version__} is installed: pip install 'zif[transformers]'"
        )


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    return str(names[0])


def _load_config(source: ModelSource, config: dict[str, Any]) -> Any:
    """Return transformers' configuration object, after the refusals that need no model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    def refuse(reason: str) -> UnknownArchitectureError:
        return TracedConfig(_architecture(config), 0, (), 0).refuse(reason)

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING and not (config.get("auto_map") and source.trust_remote_code):
        if config.get("auto_map"):
            raise refuse(
                "its code comes with the checkpoint and is run only with trust_remote_code=True; read the code in "
                f"{str(source.path)!r} first"
            )
        raise refuse(f"the installed transformers package does not know the model type {model_type!r}")
    try:
        hf_config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=source.trust_remote_code
        )
    except (KeyError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise refuse(f"transformers rejects its config.json ({error})") from error
    reason = _reason_against(hf_config, source)
    if reason:
        raise refuse(reason)
    return hf_config


def _reason_against(hf_config: Any, source: ModelSource) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = getattr(hf_config, "auto_map", None) or {}
    if getattr(hf_config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    text_config = hf_config.get_text_config()
    if not hasattr(text_config, "num_hidden_layers"):
        return f"{type(hf_config).__name__} does not say how many layers it has"
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (
        "AutoModelForCausalLM" in remote and source.trust_remote_code
    ):
        return f"transformers has no causal language model for {type(hf_config).__name__}"
    if getattr(hf_config, "quantization_config", None):
        return "its weights are quantized, which only native decoders read"
    return None


def _max_model_len(source: ModelSource, text_config: Any, max_position: int | None) -> int:
    """Choose the longest sequence to serve.

    Beyond their original length, longrope embeddings rotate all positions of a step according to the longest request
    in it, so nothing longer is served.
    """
    asked = source.max_model_len
    originals = [_original_length(rope, text_config) for rope in _ropes(text_config) if rope["rope_type"] == "longrope"]
    if asked is not None and asked > min(originals, default=asked):
        raise ConfigError(
            f"max_model_len={asked!r} exceeds {min(originals)}, beyond which transformers rotates the positions of all "
            f"requests according to the longest one; ask for at most {min(originals)}"
        )
    if max_position is None and asked is None:
        raise ConfigError("max_model_len=None, and config.json has no max_position_embeddings; set max_model_len")
    longest = max_position or asked or 0
    return resolve_max_model_len(source, longest, min([longest, *originals]))


def _original_length(rope: dict[str, Any], text_config: Any) -> int:
    name = "original_max_position_embeddings"
    return int(rope.get(name) or getattr(text_config, name, None) or text_config.max_position_embeddings)


def _ropes(text_config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters: one set, or one for each type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    for rope in [parameters, *parameters.values()]:
        if isinstance(rope, dict) and "rope_type" in rope:
            yield rope


def _build_without_weights(
    hf_config: Any, source: ModelSource, dtype: torch.dtype, traced_config: TracedConfig
) -> SplitModel:
    from transformers import AutoModelForCausalLM

    register()
    hf_config = copy.deepcopy(hf_config)
    for rope in _ropes(hf_config.get_text_config()):
        if rope["rope_type"] in _LENGTH_DEPENDENT_ROPES:
            rope["rope_type"] = "default"  # the others branch on positions, and here positions have no data
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=TRACED_ATTENTION,
                experts_implementation=TRACED_EXPERTS,
                trust_remote_code=source.trust_remote_code,
            )
    except _BUILD_ERRORS as error:
        if TRACED_ATTENTION in str(error):
            reason = "its layers do not go through transformers' attention interface"
        else:
            reason = f"transformers cannot build it without weights ({type(error).__name__}: {error})"
        raise traced_config.refuse(reason) from error
    path = find_decoder_path(model)
    if path is None:
        raise traced_config.refuse("it has no decoder apart from its head whose layers are numbered by layer_idx")
    return SplitModel(model.eval(), path)


def _weight_bytes(model: SplitModel, dtype: torch.dtype) -> int:
    """Count parameters and buffers once each, in the dtypes that loading gives them."""
    plan: dict[str, torch.dtype] = model.head._get_dtype_plan(dtype)  # type: ignore[operator]
    widened = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in plan) or r"$^")
    parameters = sum(
        p.numel() * (torch.float32.itemsize if widened.search(name) else p.element_size())
        for name, p in model.named_parameters()
    )
    return parameters + sum(buffer.nbytes for buffer in model.buffers())


def _kv_specs(layers: tuple[TracedLayer, ...], block_size: int, dtype: str) -> tuple[KVSpec, ...]:
    """Group layers that keep the same state: layers that see everything first, then by window."""
    groups: dict[tuple[int, int, int], list[TracedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.window or 0, layer.num_kv_heads, layer.head_dim), []).append(layer)
    specs: list[KVSpec] = []
    for (window, num_kv_heads, head_dim), members in sorted(groups.items()):
        owners = tuple(sorted(member.layer for member in members if member.owner is None))
        readers = tuple(sorted((member.layer, member.owner) for member in members if member.owner is not None))
        shape = (owners, num_kv_heads, head_dim, block_size, dtype)
        if window:
            specs.append(SlidingWindowSpec(*shape, window, readers=readers))
        else:
            specs.append(FullAttentionSpec(*shape, readers=readers))
    return tuple(specs)


def _state_specs(layers: tuple[TracedState, ...], block_size: int, dtype: str) -> tuple[KVSpec, ...]:
    """Group layers that carry the same tensors."""
    groups: dict[tuple[StateTensor, ...], list[int]] = {}
    for layer in layers:
        groups.setdefault(layer.tensors, []).append(layer.layer)
    return tuple(RecurrentStateSpec(tuple(group), tensors, block_size, dtype) for tensors, group in groups.items())


def _state_bytes(layer: TracedState) -> int:
    return sum(math.prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in layer.tensors)


def _features(traced: Trace) -> frozenset[Feature]:
    """Name what the platform must offer. Experts are absent: transformers computes them itself."""
    asked = {
        Feature.ATTENTION_FULL: any(layer.window is None for layer in traced.layers),
        Feature.ATTENTION_SLIDING_WINDOW: any(layer.window is not None for layer in traced.layers),
        Feature.ATTENTION_SOFTCAP: any(layer.has_softcap for layer in traced.layers),
        Feature.ATTENTION_SINKS: any(layer.has_sinks for layer in traced.layers),
        Feature.STATE_RECURRENT: bool(traced.states),
        Feature.TRANSFORMERS_BACKEND: True,
    }
    return frozenset(feature for feature, needed in asked.items() if needed)
