"""The models that are compared: their configurations, their tensors, and what a floor needs to know of them."""

from dataclasses import dataclass
from typing import Any

_SHARED: dict[str, Any] = {
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "hidden_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        **_SHARED,
    },
    "moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 32768,
        "num_hidden_layers": 8,
        "intermediate_size": 3072,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **_SHARED,
    },
    # So little to compute that what is left is serving; no workload of the engines has it.
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 3072,
        "num_hidden_layers": 1,
        "intermediate_size": 128,
        **_SHARED,
        "head_dim": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 64,
    },
}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the floors of a model are computed from. The embedding is the head too, and counted once, as the head."""

    matrices: dict[str, int]
    num_layers: int
    num_kv_values: int
    num_query_values: int
    num_experts: int = 1
    num_chosen: int = 1

    @property
    def head_weights(self) -> int:
        """Return the weights of the head."""
        return self.matrices["model.embed_tokens.weight"]

    @property
    def weights_per_token(self) -> float:
        """Return the weights that one token is multiplied with, the head's included."""
        return sum(self._share(name, 1) * weights for name, weights in self.matrices.items())

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of keys and values of one position in all layers, 16 bits each."""
        return self.num_layers * 2 * self.num_kv_values * 2

    @property
    def attention_products_per_pair(self) -> int:
        """Return the products that a query and a key cost in all layers, the weighting of the value included."""
        return self.num_layers * 2 * self.num_query_values

    def weights_read(self, num_tokens: int) -> float:
        """Return the weights that a step of so many tokens reads, if each chooses its experts at random."""
        return sum(self._share(name, num_tokens) * weights for name, weights in self.matrices.items())

    def _share(self, name: str, num_tokens: int) -> float:
        if ".experts." not in name:
            return 1.0
        return 1 - (1 - self.num_chosen / self.num_experts) ** num_tokens


def model_shape(name: str) -> ModelShape:
    """Return the shape of a model by name."""
    config = CONFIGS[name]
    return ModelShape(
        {key: shape[0] * shape[1] for key, shape in shapes(config).items() if len(shape) == 2},
        config["num_hidden_layers"],
        config["num_key_value_heads"] * config["head_dim"],
        config["num_attention_heads"] * config["head_dim"],
        config.get("num_experts", 1),
        config.get("num_experts_per_tok", 1),
    )


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        **_ffn_shapes(config),
    }
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in per_layer.items()}
    return found


def _ffn_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    if "num_experts" not in config:
        inner = config["intermediate_size"]
        return {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    inner = config["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"mlp.gate": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            found[f"mlp.experts.{expert}.{name}_proj"] = shape
    return found
