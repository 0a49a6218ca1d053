"""Packed experts of gpt-oss: unpacked exactly, and the same model as the unpacked checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import build_checkpoint, edit_config
from support.native_models import describe_native, native_logits
from zif.contract import Feature
from zif.errors import CheckpointError, ModelError
from zif.models.mxfp4 import dequantize

QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
SHAPES = {"gate_up_proj": (4, 64, 64), "down_proj": (4, 64, 32)}
"""Of the experts of the tiny checkpoint: [E, 2I, C] and [E, C, I]."""


def element(code: int) -> float:
    """Decode E2M1 by its definition: sign, exponent with bias 1, one bit of mantissa, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return sign * magnitude


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Unpack in float64, element by element of the definition."""
    packed = blocks.numpy()
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)
    numbers = np.vectorize(element)(codes)
    scaled = numbers * 2.0 ** (scales.numpy().astype(np.float64) - 127)[..., None]
    return scaled.reshape(*packed.shape[:-2], -1)


def random_packed(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    *lead, columns = shape
    blocks = torch.randint(0, 256, (*lead, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (*lead, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    """A gpt-oss checkpoint as it is published, beside `plain`, the same with unpacked experts."""
    plain = load_file(build_checkpoint("gpt_oss", tmp_path / "plain") / "model.safetensors")
    packed = dict(plain)
    for seed, name in enumerate(sorted(n for n in plain if n.endswith(("gate_up_proj", "down_proj")))):
        blocks, scales = random_packed(SHAPES[name.rsplit(".", 1)[1]], seed)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = torch.from_numpy(unpack(blocks, scales)).float().transpose(1, 2).contiguous()
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    folder = build_checkpoint("gpt_oss", tmp_path / "packed")
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=QUANTIZATION)
    return folder


def test_every_code_at_every_scale_is_exact() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    expected = unpack(blocks, scales)
    with np.errstate(over="ignore"):
        in_float32 = torch.from_numpy(expected.astype(np.float32))
    assert torch.equal(dequantize(blocks, scales), in_float32)


def test_scale_255_is_not_a_number() -> None:
    blocks, scales = random_packed((2, 64), 0)
    scales[1, 1] = 255
    numbers = dequantize(blocks, scales)
    assert numbers[1, 32:].isnan().all()
    assert numbers[0].isfinite().all()
    assert numbers[1, :32].isfinite().all()


def test_unpacking_agrees_with_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_packed((3, 8, 96), 0)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantize(blocks, scales), theirs.transpose(1, 2))


def test_packed_checkpoint_is_the_unpacked_model(packed_folder: Path) -> None:
    prompt = torch.arange(30) * 7 % 256
    plain = native_logits(packed_folder.parent / "plain", prompt)
    assert plain.std() > 0.3
    assert torch.equal(native_logits(packed_folder, prompt), plain)


def test_description_says_that_experts_are_unpacked(packed_folder: Path) -> None:
    description = describe_native(packed_folder)
    assert Feature.QUANTIZATION_MXFP4_DEQUANTIZED in description.features
    plain = describe_native(packed_folder.parent / "plain")
    assert Feature.QUANTIZATION_MXFP4_DEQUANTIZED not in plain.features
    assert description.weight_bytes == plain.weight_bytes


def test_corrupt_scale_is_named(packed_folder: Path) -> None:
    tensors = load_file(packed_folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    tensors[f"{name}_scales"][1, 2, 0] = 255
    save_file(tensors, packed_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        native_logits(packed_folder, torch.arange(3))


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "hqq", "auto-round", "modelopt"])
def test_other_quantization_is_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantization method '{method}' is not implemented"):
        describe_native(folder)


def test_packed_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = build_checkpoint("mixtral", tmp_path)
    edit_config(folder, quantization_config=QUANTIZATION)
    with pytest.raises(ModelError, match="'mxfp4' is not implemented for this architecture"):
        describe_native(folder)
