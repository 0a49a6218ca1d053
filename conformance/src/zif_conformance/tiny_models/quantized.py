"""Writes a checkpoint twice: with weights as codes, as a public format packs them, and with the numbers they stand for.

The codes are rounded and packed here; nothing of core's reading is used. What Transformers makes of the numbers is the
truth, with activations rounded on the way where the scheme says so. Formats: compressed-tensors; GPTQ (AutoGPTQ); AWQ
(AutoAWQ, version "gemm").
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from zif.contract import Capabilities, WeightScheme
from zif_conformance.oracle.quantization import DrawnWeight, numbers_of_rows, rounded_weight
from zif_conformance.tiny_models.checkpoints import write_checkpoint
from zif_conformance.tiny_models.truth import Truth

GROUP = 32
_SIZES = {"hidden_size": 2 * GROUP, "intermediate_size": 3 * GROUP}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lie in a word, from its lowest bits on."""
_DOUBT = 1 / 512
"""How near half way between two codes an activation must be for a float32 model to be allowed either."""
_LM_HEAD = "lm_head"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """A way to store weights: their scheme, the dtype of scales, what `config.json` says, and the tensors."""

    scheme: WeightScheme
    scale_dtype: torch.dtype
    config: Mapping[str, Any]
    tensors: Callable[[DrawnWeight], Tensors]


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """Folders of one model: `plain` holds float32, `held` the same numbers as codes, or those before rounding.

    `rounded` are the modules whose activations are rounded to 8 bits.
    """

    plain: Path
    held: Path
    rounded: frozenset[str]

    @property
    def tensors(self) -> Path:
        """Return the file of the codes."""
        return self.held / "model.safetensors"

    def truth(self, dtype: str) -> Truth:
        """Return what Transformers makes of the numbers."""
        truth = Truth.of(self.plain, dtype)
        for model, doubt in ((truth.exact_model, 0.0), (truth.declared_model, _DOUBT)):
            for name, module in model.named_modules():
                if name in self.rounded:
                    module.register_forward_pre_hook(_rounding(doubt))
        return truth


def write_packed_codes(root: Path, capabilities: Capabilities, name: str) -> QuantizedCheckpoint:
    """Write both checkpoints of a small dense model under `root`, all matrices but embedding and output as codes."""
    from safetensors.torch import load_file, save_file

    chosen = FORMATS[name]
    written, matrices = _both(root, capabilities, "dense")
    plain, stored = load_file(written.plain / "model.safetensors"), load_file(written.tensors)
    inside = [module for module in matrices if module != _LM_HEAD]
    for module in inside:
        weight = rounded_weight(stored.pop(f"{module}.weight"), chosen.scheme, chosen.scale_dtype)
        plain[f"{module}.weight"] = weight.elements().float()
        stored |= {f"{module}.{suffix}": tensor for suffix, tensor in chosen.tensors(weight).items()}
    save_file(plain, written.plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, written.tensors, metadata={"format": "pt"})
    declare_quantization(written.held, chosen.config)
    return QuantizedCheckpoint(
        written.plain, written.held, frozenset(inside if chosen.scheme.dynamic_activations else ())
    )


def write_rounded(root: Path, capabilities: Capabilities, family: str, bits: int) -> QuantizedCheckpoint:
    """Write a model as it is, and with the numbers that loading rounds it to: 8 bits, or 4 but for the outer ones."""
    from safetensors.torch import load_file, save_file

    written, matrices = _both(root, capabilities, family)
    plain = load_file(written.plain / "model.safetensors")
    outer = {"model.embed_tokens", _LM_HEAD}
    eight, four = WeightScheme(8, dynamic_activations=True), WeightScheme(4, GROUP)
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if tensor.ndim > 1 and not name.endswith((".gate.weight", "router.weight")):
            scheme = eight if bits == 8 or module in outer else four
            plain[name] = rounded_weight(tensor, scheme, torch.float32).elements().float()
    save_file(plain, written.plain / "model.safetensors", metadata={"format": "pt"})
    return QuantizedCheckpoint(written.plain, written.held, frozenset(matrices if bits == 8 else (_LM_HEAD,)))


def declare_quantization(folder: Path, config: Mapping[str, Any]) -> None:
    """Let `config.json` say how weights are quantized."""
    path = folder / "config.json"
    written = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": dict(config)}
    path.write_text(json.dumps(written), encoding="utf-8")


def _both(root: Path, capabilities: Capabilities, family: str) -> tuple[QuantizedCheckpoint, list[str]]:
    """Write the model twice. Returns the folders and the modules that multiply matrices, experts aside."""
    from safetensors.torch import load_file

    plain, held = (write_checkpoint(family, root / name, capabilities, **_SIZES) for name in ("plain", "held"))
    written = QuantizedCheckpoint(plain, held, frozenset())
    matrices = [name.removesuffix(".weight") for name in load_file(written.tensors) if name.endswith("proj.weight")]
    return written, [*(name for name in matrices if ".experts." not in name), _LM_HEAD]


def _rounding(doubt: float) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """Return a hook that gives a module the numbers of codes, each token with a scale of its own."""

    def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = arguments
        return (numbers_of_rows(x.flatten(0, -2), doubt).to(x.dtype).view(x.shape),)

    return hook


def _counted_from_zero(weight: DrawnWeight, codes: torch.Tensor) -> torch.Tensor:
    return codes + 128 if weight.scheme.bits == 8 else codes


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes from 0 on along the last axis into words of 32 bits, the first in the lowest. Returns int32."""
    per_word = 32 // bits
    spread = codes.reshape(len(codes), -1, per_word) << (bits * torch.arange(per_word))
    words = spread.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _one_by_one(weight: DrawnWeight) -> Tensors:
    return {"weight": weight.codes.to(torch.int8), "weight_scale": weight.scales.to(torch.bfloat16)}


def _compressed(weight: DrawnWeight) -> Tensors:
    bits, zeros = weight.scheme.bits, _counted_from_zero(weight, weight.zeros)
    packed_zeros = {"weight_zero_point": _words(zeros.T, bits).T.contiguous()}
    return {
        "weight_packed": _words(_counted_from_zero(weight, weight.codes), bits),
        "weight_scale": weight.scales.to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.codes.shape),
        **(packed_zeros if weight.scheme.zero_points else {}),
    }


def _gptq(less: int) -> Callable[[DrawnWeight], Tensors]:
    """Return how codes are packed along the inputs, with zeros stored `less` one or as they are."""

    def tensors(weight: DrawnWeight) -> Tensors:
        bits, zeros = weight.scheme.bits, _counted_from_zero(weight, weight.zeros)
        return {
            "qweight": _words(_counted_from_zero(weight, weight.codes), bits).T.contiguous(),
            "qzeros": _words(zeros.T - less, bits),
            "scales": weight.scales.T.to(torch.float16).contiguous(),
            "g_idx": (torch.arange(weight.codes.shape[-1]) // weight.group_size).to(torch.int32),
        }

    return tensors


def _awq(weight: DrawnWeight) -> Tensors:
    codes, zeros = (
        outputs.T.reshape(outputs.shape[1], -1, 8)[..., _AWQ_ORDER].flatten(1)
        for outputs in (weight.codes, weight.zeros)
    )
    return {
        "qweight": _words(codes, 4),
        "qzeros": _words(zeros, 4),
        "scales": weight.scales.T.to(torch.float16).contiguous(),
    }


def _compressed_config(scheme: WeightScheme, stated: str) -> dict[str, Any]:
    by_token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.zero_points,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = by_token if scheme.dynamic_activations else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": stated,
        "config_groups": {"group_0": group},
        "ignore": [_LM_HEAD],
    }


def _gptq_config(scheme: WeightScheme, **more: str) -> dict[str, Any]:
    sizes = {"bits": scheme.bits, "group_size": scheme.group_size or -1, "sym": not scheme.zero_points}
    return {"quant_method": "gptq", "desc_act": False, **sizes, **more}


def _format(
    scheme: WeightScheme, scale_dtype: torch.dtype, config: dict[str, Any], tensors: Callable[[DrawnWeight], Tensors]
) -> Format:
    return Format(scheme, scale_dtype, MappingProxyType(config), tensors)


def _packed(scheme: WeightScheme) -> Format:
    return _format(scheme, torch.bfloat16, _compressed_config(scheme, "pack-quantized"), _compressed)


def _of_gptq(scheme: WeightScheme) -> Format:
    return _format(scheme, torch.float16, _gptq_config(scheme), _gptq(less=1))


_W8A8 = WeightScheme(8, dynamic_activations=True)
_W4A16_ZEROS = WeightScheme(4, GROUP, zero_points=True)
_AWQ_CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "compressed-w8a8": _format(_W8A8, torch.bfloat16, _compressed_config(_W8A8, "int-quantized"), _one_by_one),
        "compressed-w8a16": _packed(WeightScheme(8, GROUP)),
        "compressed-w4a16": _packed(WeightScheme(4, GROUP)),
        "compressed-w4a16-zeros": _packed(_W4A16_ZEROS),
        "gptq-w8a16": _of_gptq(WeightScheme(8)),
        "gptq-w4a16": _of_gptq(WeightScheme(4, GROUP)),
        "gptq-w4a16-zeros": _of_gptq(_W4A16_ZEROS),
        "gptq-v2-w4a16-zeros": _format(
            _W4A16_ZEROS, torch.float16, _gptq_config(_W4A16_ZEROS, checkpoint_format="gptq_v2"), _gptq(less=0)
        ),
        "awq-w4a16-zeros": _format(_W4A16_ZEROS, torch.float16, _AWQ_CONFIG, _awq),
    }
)
"""Every format that core reads, in each scheme that it is known in."""
