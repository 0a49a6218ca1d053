"""Write a checkpoint as a GGUF file of the same weights, with the `gguf` package. Runs in llama.cpp's environment.

    python -m cpu.gguf_file CHECKPOINT FILE BF16|Q8_0

Norms and the router are float32, as llama.cpp's own converter has them; every other matrix, the embedding (which is the
head too) included, is of the type given.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_ROUTER = {"mlp.gate": "ffn_gate_inp"}


class Checkpoint:
    """A safetensors file of bfloat16, read without torch."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header: dict[str, Any] = json.loads(file.read(size))
        self._data = np.memmap(path, np.uint8, "r", offset=8 + size)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']!r}; only BF16 is read here")
        first, last = entry["data_offsets"]
        halves = self._data[first:last].view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32).reshape(entry["shape"])


def write(checkpoint: Checkpoint, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write the whole file."""
    config = checkpoint.config
    is_sparse = "num_experts" in config
    writer = gguf.GGUFWriter(path, "qwen3moe" if is_sparse else "qwen3")
    _add_fields(writer, config)
    _add(writer, "token_embd.weight", checkpoint["model.embed_tokens.weight"], kind)
    _add(writer, "output_norm.weight", checkpoint["model.norm.weight"], kind)
    for layer in range(config["num_hidden_layers"]):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        for old, new in {**_NAMES, **(_ROUTER if is_sparse else _DENSE)}.items():
            _add(writer, f"{target}.{new}.weight", checkpoint[f"{source}.{old}.weight"], kind)
        for part in ("gate", "up", "down") if is_sparse else ():
            experts = [checkpoint[f"{source}.mlp.experts.{e}.{part}_proj.weight"] for e in range(config["num_experts"])]
            _add(writer, f"{target}.ffn_{part}_exps.weight", np.stack(experts), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_fields(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    # Prompts are token ids and answers are not read: no vocabulary is needed.
    writer.add_tokenizer_model("no_vocab")


def _add(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, tensor)
    else:
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def main() -> None:
    folder, path, kind = Path(sys.argv[1]), Path(sys.argv[2]), gguf.GGMLQuantizationType[sys.argv[3]]
    partial = path.with_suffix(".partial")
    write(Checkpoint(folder), partial, kind)
    partial.rename(path)


if __name__ == "__main__":
    main()
