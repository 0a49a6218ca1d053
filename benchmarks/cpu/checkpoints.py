"""Random weights with the shapes of real models, in the format that every peer can read or convert.

What it is: small-deviation normal weights in bfloat16, so that no engine meets a value that is not finite, with the
tokenizer of the model in examples/ (prompts are token ids; some peers want a tokenizer to be there). `dense` has the
shape of Qwen3-0.6B; `moe` that of Qwen3-MoE, scaled to fit; `tiny` has one layer, 64 wide. `dense-int8` and `moe-int8`
hold the same weights as their namesakes in the compressed-tensors format, 8 bits per channel with activations quantized
per token, for engines that quantize offline.

    python -m cpu.checkpoints FOLDER dense|moe|tiny|dense-int8|moe-int8
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cpu.shapes import CONFIGS, shapes

TOKENIZER = Path(__file__).parents[2] / "examples" / "embedded_model" / "checkpoint"
DEVIATION = 0.02

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def write(folder: Path, name: str) -> None:
    """Write a checkpoint of random weights; a norm's are one."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * DEVIATION

    _save(folder, config, {key: tensor(shape) for key, shape in shapes(config).items()})


def write_int8(folder: Path, source: Path) -> None:
    """Write the checkpoint in `source` with its linear layers in 8 bits."""
    tensors = {}
    with safe_open(source / "model.safetensors", "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            tensor = opened.get_tensor(name)
            if tensor.dim() == 1 or "embed_tokens" in name or name.endswith("mlp.gate.weight"):
                tensors[name] = tensor
                continue
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    _save(folder, {**config, "quantization_config": INT8}, tensors)


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    if name.endswith("-int8"):
        write_int8(folder, folder.parent / name.removesuffix("-int8"))
    else:
        write(folder, name)


if __name__ == "__main__":
    main()
