"""Tiny random checkpoints of every family that zif serves, written by transformers itself.

Not fixtures: plain functions that any test calls. A checkpoint is built once per process and copied from then on, so a
test may damage its copy.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, write_tokenizer

SHARD_SIZE = "40KB"


@dataclass(frozen=True, slots=True)
class Family:
    """How to build one family: transformers' class names and the configuration's arguments."""

    model_class: str
    config_class: str
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ties_scaled_embedding(self) -> bool:
        """Whether each token would predict itself unless the embedding is small and the final norm large."""
        return self.model_class.startswith("Gemma")


_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def _family(name: str, config_class: str | None = None, **config: Any) -> Family:
    """Name transformers' classes after `name`, on top of the shared dense configuration."""
    return Family(f"{name}ForCausalLM", config_class or f"{name}Config", {**_DENSE, **config})


FAMILIES: dict[str, Family] = {
    "llama2": _family("Llama", num_key_value_heads=4),
    "llama3": _family("Llama", rope_parameters=_LLAMA3_ROPE),
    "mistral": _family("Mistral", sliding_window=12, head_dim=16),
    "qwen2": _family("Qwen2"),
    "qwen3": _family("Qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": _family(
        "Qwen3Moe",
        head_dim=16,
        num_hidden_layers=4,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "mixtral": _family("Mixtral", intermediate_size=32, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _family(
        "Gemma2",
        head_dim=16,
        num_hidden_layers=4,
        sliding_window=12,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
    ),
    "gemma3": _family(
        "Gemma3",
        "Gemma3TextConfig",
        head_dim=16,
        num_hidden_layers=6,
        sliding_window=12,
        query_pre_attn_scalar=24,
        rope_parameters=_GEMMA3_ROPE,
        layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2,
    ),
    "phi3": _family("Phi3", hidden_size=64, original_max_position_embeddings=512),
    "phi3_partial": _family(
        "Phi3",
        hidden_size=64,
        original_max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "phi3_longrope": _family(
        "Phi3", hidden_size=64, original_max_position_embeddings=64, rope_parameters=_LONGROPE, sliding_window=40
    ),
    "olmo2": _family("Olmo2"),
    "smollm3": _family("SmolLM3", num_hidden_layers=4, no_rope_layer_interval=4),
    "granite": _family(
        "Granite", embedding_multiplier=6.0, logits_scaling=2.0, residual_multiplier=0.4, attention_multiplier=0.2
    ),
    "gpt_oss": _family(
        "GptOss",
        hidden_size=64,
        head_dim=16,
        intermediate_size=32,
        num_hidden_layers=4,
        sliding_window=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_YARN_ROPE,
    ),
}


_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

HYBRIDS: dict[str, Family] = {
    "qwen3_next": _family(
        "Qwen3Next",
        **_DELTA,
        **_EXPERTS,
        head_dim=16,
        num_hidden_layers=4,
        num_experts=4,
        shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "granite_hybrid": _family(
        "GraniteMoeHybrid",
        **_MAMBA2,
        num_hidden_layers=4,
        shared_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["mamba", "attention"] * 2,
        embedding_multiplier=6.0,
        logits_scaling=2.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
    ),
    "falcon_h1": _family("FalconH1", **_MAMBA2, mamba_d_ssm=96, lm_head_multiplier=0.5),
    "lfm2": _family(
        "Lfm2",
        num_hidden_layers=4,
        block_auto_adjust_ff_dim=False,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"] * 2,
    ),
    "bamba": _family("Bamba", **_MAMBA2, attn_layer_indices=[1]),
    "nemotron_h": _family(
        "NemotronH",
        num_hidden_layers=4,
        layers_block_type=["mamba", "moe", "attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=24,
        ssm_state_size=16,
        n_groups=2,
        conv_kernel=4,
        chunk_size=8,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
    ),
    "jamba": _family(
        "Jamba", num_experts=2, mamba_d_state=16, mamba_d_conv=4, attn_layer_period=2, attn_layer_offset=1
    ),
    "kimi_linear": _family(
        "KimiLinear",
        **_EXPERTS,
        num_hidden_layers=2,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=4,
        v_head_dim=8,
        num_experts=4,
        layer_types=["linear_attention", "full_attention"],
        linear_attn_config={"head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4},
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_heads": 4,
            "head_dim": 24,
            "state_size": 16,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 8,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        },
    ),
}
"""Families with recurrent layers, which the native decoder does not serve."""

_SHARING_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_SHARING: dict[str, Any] = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": _SHARING_LAYERS,
    "head_dim": 12,
    "sliding_window": 11,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
}
SHARING: dict[str, Family] = {
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        _DENSE
        | _SHARING
        | {
            "intermediate_size": [96] * 5,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
            "altup_num_inputs": 2,
            "laurel_rank": 4,
        },
    ),
}
"""Families whose last layers read the keys and values of earlier ones."""


def build_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` with its tokenizer into `folder` and return `folder`.

    `overrides` replace arguments of the configuration. `max_shard_size` is as in `save_pretrained`.
    """
    options = json.dumps([family, dtype, seed, max_shard_size, overrides], sort_keys=True)
    shutil.copytree(_cached_checkpoint(options), folder, dirs_exist_ok=True)
    return folder


def build_sharded_checkpoint(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a checkpoint whose tensors are spread over several files with an index."""
    return build_checkpoint(family, folder, max_shard_size=SHARD_SIZE, **overrides)


def build_tied_checkpoint(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a checkpoint whose output matrix is the embedding and is not stored."""
    return build_checkpoint(family, folder, tie_word_embeddings=True, **overrides)


def edit_config(folder: Path, removed: tuple[str, ...] = (), **changes: Any) -> None:
    """Rewrite `config.json` in `folder`: drop the keys `removed`, then set `changes`."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(config | changes))


@functools.cache
def _cache_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="zif-checkpoints-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _cached_checkpoint(options: str) -> Path:
    import transformers

    name, dtype, seed, max_shard_size, overrides = json.loads(options)
    family = (FAMILIES | HYBRIDS | SHARING)[name]
    config = getattr(transformers, family.config_class)(**{**family.config, **overrides})
    model = getattr(transformers, family.model_class)(config)
    _randomize(model, seed)
    if family.ties_scaled_embedding:
        _shrink_embedding(model)
    folder = Path(tempfile.mkdtemp(dir=_cache_folder(), prefix=f"{name}-"))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw weights that make every part of the model matter: logits are peaked, norms and biases are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(_vector(name, parameter, noise))
        elif "embed_tokens" in name:
            parameter.copy_(noise * 0.5)
        else:
            parameter.copy_(noise * 1.6 / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def _shrink_embedding(model: torch.nn.Module) -> None:
    model.get_parameter("model.embed_tokens.weight").mul_(0.1)
    model.get_parameter("model.norm.weight").add_(3.0)


def _vector(name: str, current: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith("sinks"):
        return noise
    if "norm" in name:
        return current + 0.2 * noise
    return 0.3 * noise
