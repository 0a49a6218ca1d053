"""Native decoders give transformers' logits, in every family, form of configuration, and form of checkpoint."""

from pathlib import Path

import pytest
import torch

from support.checkpoints import (
    FAMILIES,
    build_checkpoint,
    build_sharded_checkpoint,
    build_tied_checkpoint,
    edit_config,
)
from support.native_models import native_logits, transformers_logits

TOLERANCE = 1e-4
LONG_MODELS = {"phi3_longrope": 512}
"""LongRoPE serves the original length unless more is asked for."""


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3, "flat logits would hide differences"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_beyond_every_window(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    prompt = tokens(100)
    ours = native_logits(folder, prompt, max_model_len=LONG_MODELS.get(family))
    assert_same_logits(ours, transformers_logits(folder, prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers_for_a_short_prompt(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path, seed=1)
    prompt = tokens(7, seed=1)
    assert_same_logits(native_logits(folder, prompt), transformers_logits(folder, prompt))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
NEW_KEYS = ("rope_parameters", "layer_types", "dtype")
HUB_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama-without-scaling": ("llama2", {"rope_theta": 10000.0, "rope_scaling": None, "pretraining_tp": 1}),
    "llama-without-base": ("llama2", {}),
    "llama3": ("llama3", {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama-linear-by-type": ("llama3", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "qwen2-yarn": ("qwen2", {"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", **YARN}}),
    "qwen3": ("qwen3", {"rope_theta": 1000000, "rope_scaling": None, "max_window_layers": 3}),
    "qwen3-moe-num-experts": ("qwen3_moe", {"rope_theta": 1000000.0, "num_experts": 8}),
    "mistral": ("mistral", {"rope_theta": 10000.0}),
    "mistral-without-window": ("mistral", {"rope_theta": 10000.0, "sliding_window": None}),
    "mixtral": ("mixtral", {"rope_theta": 1e6}),
    "mixtral-without-base": ("mixtral", {}),
    "gemma2": ("gemma2", {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    "gemma3": ("gemma3", {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 3}),
    "gemma3-scaled": (
        "gemma3",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3-defaults": ("gemma3", {}),
    "phi3": ("phi3", {"rope_theta": 10000.0, "rope_scaling": None}),
    "phi3-partial": ("phi3", {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.75}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
    ),
    "olmo2": ("olmo2", {"rope_theta": 500000, "rope_scaling": None}),
    "smollm3": ("smollm3", {"rope_theta": 5000000.0, "rope_scaling": None, "no_rope_layer_interval": 4}),
    "smollm3-without-base": ("smollm3", {}),
    "granite": ("granite", {"rope_theta": 10000.0, "rope_scaling": None}),
    "gpt-oss": (
        "gpt_oss",
        {
            "rope_theta": 150000,
            "rope_scaling": {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, **YARN},
            "initial_context_length": 4096,
            "experts_per_token": 2,
        },
    ),
    "gpt-oss-defaults": ("gpt_oss", {}),
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_configurations_in_the_old_form_mean_what_they_mean_to_transformers(name: str, tmp_path: Path) -> None:
    family, changes = HUB_CONFIGS[name]
    folder = build_checkpoint(family, tmp_path)
    renamed = ("num_local_experts",) if "num_experts" in changes else ()
    edit_config(folder, removed=(*NEW_KEYS, *renamed), **{"torch_dtype": "float32", **changes})
    prompt = tokens(70)
    assert_same_logits(native_logits(folder, prompt), transformers_logits(folder, prompt))


MSCALE = {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16.0, "beta_slow": 2.0}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama-biases": ("llama2", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama3", {"head_dim": 20}),
    "llama-yarn": ("llama2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}}),
    "llama-yarn-mscale": ("llama2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, **MSCALE}}),
    "llama-gelu": ("llama2", {"hidden_act": "gelu"}),
    "qwen2-late-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3-late-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3-chosen-windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3-moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    "qwen3-moe-unnormalized": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    "mixtral-window": ("mixtral", {"sliding_window": 9}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3-capped": ("gemma3", {"final_logit_softcapping": 3.0}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "smollm3-windows": ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
    "smollm3-listed": ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_match_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    folder = build_checkpoint(family, tmp_path, **overrides)
    prompt = tokens(40)
    assert_same_logits(native_logits(folder, prompt), transformers_logits(folder, prompt))


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mixtral", "gpt_oss"])
def test_shards_load_like_one_file(family: str, tmp_path: Path) -> None:
    whole = build_checkpoint(family, tmp_path / "whole")
    sharded = build_sharded_checkpoint(family, tmp_path / "sharded")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    prompt = tokens(20)
    torch.testing.assert_close(native_logits(sharded, prompt), native_logits(whole, prompt), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama2", "olmo2", "gpt_oss"])
def test_tied_output_matrix_matches_transformers(family: str, tmp_path: Path) -> None:
    folder = build_tied_checkpoint(family, tmp_path)
    prompt = tokens(20)
    assert_same_logits(native_logits(folder, prompt), transformers_logits(folder, prompt))


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_untied_output_matrix_matches_transformers(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path, tie_word_embeddings=False)
    prompt = tokens(20)
    assert_same_logits(native_logits(folder, prompt), transformers_logits(folder, prompt))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_narrow_checkpoint_held_in_float32_matches_transformers(stored: str, tmp_path: Path) -> None:
    folder = build_checkpoint("qwen3", tmp_path, dtype=stored)
    prompt = tokens(20)
    assert_same_logits(native_logits(folder, prompt, dtype="float32"), transformers_logits(folder, prompt))


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen3_moe"])
def test_bfloat16_is_as_close_to_float32_as_transformers(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    prompt = tokens(60)
    exact = transformers_logits(folder, prompt)
    ours = (native_logits(folder, prompt, dtype="bfloat16") - exact).abs().mean()
    theirs = (transformers_logits(folder, prompt, torch.bfloat16) - exact).abs().mean()
    assert ours < 1.2 * theirs


def test_longrope_serves_the_original_length_with_the_short_factors(tmp_path: Path) -> None:
    folder = build_checkpoint("phi3_longrope", tmp_path)
    prompt = tokens(64)
    short = native_logits(folder, prompt)
    assert_same_logits(short, transformers_logits(folder, prompt))
    assert not torch.allclose(short, native_logits(folder, prompt, max_model_len=65), atol=0.1)
