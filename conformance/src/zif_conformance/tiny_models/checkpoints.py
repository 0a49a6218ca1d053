"""Writes tiny checkpoints: one per kind of layer, random weights that make every part matter, a tokenizer of bytes.

The shapes follow what the device under test claims, so that no platform is refused for a head size.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zif.contract import Capabilities, Feature
from zif_conformance.subject import head_size

VOCAB_SIZE = 272
PRINTABLE = range(94)
"""The tokens that are one printable character of ASCII each."""
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
SPOILT_ID = 200
"""The token that `spoil_token` is used for."""
CONTEXT = 4096
_NUM_KV_HEADS = 2
_MOST_LAYERS = 3
_MOST_ELEMENT_BYTES = 4
WINDOW = 12


@dataclass(frozen=True, slots=True)
class Family:
    """Transformers' names of a family, its configuration beyond the shared one, and the features that it needs."""

    name: str
    config: str
    features: tuple[Feature, ...]
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_class(self) -> str:
        """Return the name of the class in Transformers."""
        return f"{self.name}ForCausalLM"


FAMILIES = {
    "dense": Family("Llama", "LlamaConfig", (Feature.ATTENTION_FULL,)),
    "window": Family(
        "Gemma3",
        "Gemma3TextConfig",
        (Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW),
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "softcap": Family(
        "Gemma2",
        "Gemma2Config",
        (Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW, Feature.ATTENTION_SOFTCAP),
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "experts": Family(
        "Mixtral",
        "MixtralConfig",
        (Feature.ATTENTION_FULL, Feature.MIXTURE_OF_EXPERTS),
        {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "sinks": Family(
        "GptOss",
        "GptOssConfig",
        (
            Feature.ATTENTION_FULL,
            Feature.ATTENTION_SLIDING_WINDOW,
            Feature.ATTENTION_SINKS,
            Feature.MIXTURE_OF_EXPERTS,
        ),
        {
            "intermediate_size": 32,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "hybrid": Family(
        "Qwen3Next",
        "Qwen3NextConfig",
        (
            Feature.ATTENTION_FULL,
            Feature.STATE_RECURRENT,
            Feature.TRANSFORMERS_BACKEND,
        ),
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "linear_conv_kernel_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


def write_checkpoint(family: str, folder: Path, capabilities: Capabilities, **overrides: Any) -> Path:
    """Write a float32 checkpoint of the family with its tokenizer into `folder` and return `folder`."""
    # Nothing is looked up on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    chosen = FAMILIES[family]
    config = getattr(transformers, chosen.config)(**{**_shared(capabilities), **chosen.own, **overrides})
    model = getattr(transformers, chosen.model_class)(config)
    _randomize(model, chosen.name.startswith("Gemma"))
    model.float().save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def kv_token_bytes(capabilities: Capabilities) -> int:
    """Return what one token's keys and values take in a model, at most."""
    return 2 * _MOST_LAYERS * _NUM_KV_HEADS * _head_dim(capabilities) * _MOST_ELEMENT_BYTES


def spoil_token(folder: Path, token_id: int, dtype: str) -> None:
    """Change the weights so that one token overflows `dtype` inside the first layer, and no other token is touched.

    Channel 0 of the embedding belongs to the token alone; one neuron squares it beyond the dtype's largest number, and
    that neuron's weight zero in the output makes NaN of infinity. The token is never the best one to choose.
    """
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    layer = "model.layers.0."
    mlp = layer + ("mlp.shared_expert." if layer + "mlp.shared_expert.up_proj.weight" in tensors else "mlp.")
    scale = 3e4 if dtype == "float16" else 1e25
    tensors["lm_head.weight"][token_id] = 0
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][token_id] = 0
    tensors["model.embed_tokens.weight"][token_id, 0] = 1
    for name in tensors:
        if name.startswith(layer) and name.endswith((".o_proj.weight", ".out_proj.weight")):
            tensors[name][0] = 0
    for part in ("gate_proj", "up_proj"):
        tensors[f"{mlp}{part}.weight"][0] = 0
        tensors[f"{mlp}{part}.weight"][0, 0] = scale
    tensors[f"{mlp}down_proj.weight"][:, 0] = 0
    save_file(tensors, path, metadata={"format": "pt"})


def break_weights(folder: Path) -> None:
    """Fill the weights with bytes that are no numbers, so that only what comes before reading them can refuse well."""
    path = folder / "model.safetensors"
    size = path.stat().st_size
    header = int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.seek(8 + header)
        file.write(b"\xff" * (size - 8 - header))


def _shared(capabilities: Capabilities) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": _NUM_KV_HEADS,
        "head_dim": _head_dim(capabilities),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": False,
    }


def _head_dim(capabilities: Capabilities) -> int:
    return head_size(capabilities, 16)


@torch.no_grad()
def _randomize(model: torch.nn.Module, scales_embedding: bool) -> None:
    """Draw weights whose logits are peaked; a norm or a bias is not trivial either."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(parameter + 0.2 * noise if "norm" in name else 0.3 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise * (0.1 if scales_embedding else 0.5))
        else:
            parameter.copy_(noise * 1.6 / parameter.shape[-1] ** 0.5)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and three marks; token id and byte are not the same number."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ("<|bos|>", "<|eos|>", "<|pad|>")
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marks[0],
        "eos_token": marks[1],
        "pad_token": marks[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
