"""Writes a checkpoint twice: with packed MXFP4 experts, and with the very numbers that these stand for.

The numbers are rounded here, by search among the sixteen that four bits can name, and packed from that search's
answer; nothing of core's unpacking is used. OCP Microscaling Formats (MX), version 1.0: element E2M1, scale E8M0.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zif.contract import Capabilities
from zif_conformance.tiny_models.checkpoints import write_checkpoint

BLOCK = 32
_SCALE_BIAS = 127
_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_LARGEST = 6.0
_SIZES = {"hidden_size": 2 * BLOCK, "intermediate_size": BLOCK}


@dataclass(frozen=True, slots=True)
class PackedCheckpoint:
    """Folders of one model: `plain` holds float32, `packed` the same numbers in MXFP4."""

    plain: Path
    packed: Path

    @property
    def tensors(self) -> Path:
        """Return the file of the packed tensors."""
        return self.packed / "model.safetensors"


@dataclass(frozen=True, slots=True)
class _Packed:
    """blocks: [..., B, 16], scales: [..., B], both uint8; numbers: [..., B * 32], what they stand for."""

    blocks: torch.Tensor
    scales: torch.Tensor
    numbers: torch.Tensor


def write_packed(root: Path, capabilities: Capabilities) -> PackedCheckpoint:
    """Write both checkpoints of a small model with sinks and experts under `root`."""
    from safetensors.torch import load_file, save_file

    folders = (write_checkpoint("sinks", root / name, capabilities, **_SIZES) for name in ("plain", "packed"))
    written = PackedCheckpoint(*folders)
    plain = load_file(written.tensors)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in list(plain.items()):
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            stored[name] = tensor
            continue
        # Packed along the inputs, which come last there and second here.
        packed = _pack(tensor.transpose(1, 2).contiguous())
        plain[name] = packed.numbers.transpose(1, 2).contiguous()
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = packed.blocks, packed.scales
    save_file(plain, written.plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, written.tensors, metadata={"format": "pt"})
    _declare(written.packed / "config.json", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return written


def _declare(path: Path, quantization: dict[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "quantization_config": quantization}), encoding="utf-8")


def _pack(tensor: torch.Tensor) -> _Packed:
    """Round [..., C] in blocks of 32 to the nearest numbers that a shared power of two leaves."""
    rows = tensor.float().reshape(*tensor.shape[:-1], -1, BLOCK)
    exponents = (rows.abs().amax(-1) / _LARGEST).log2().ceil()
    codes = ((rows / exponents.exp2()[..., None])[..., None] - _NUMBERS).abs().argmin(-1)
    numbers = (_NUMBERS[codes] * exponents.exp2()[..., None]).flatten(-2)
    low, high = codes[..., 0::2], codes[..., 1::2]
    return _Packed((low + 16 * high).to(torch.uint8), (exponents + _SCALE_BIAS).to(torch.uint8), numbers)
