"""Tiny checkpoints whose matrices are stored as codes, in each format that zif reads, packed here in numpy.

Nothing of core is used: codes are drawn and packed element by element of the formats' definitions, and beside each
checkpoint stands `plain`, the same model with the numbers that the codes stand for, in float32.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import build_checkpoint, edit_config

WEIGHTS = "model.safetensors"
MATRICES = re.compile(r"\.(self_attn\.\w+_proj|mlp\.\w+_proj|experts\.\d+\.\w+)\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Codes:
    """One matrix: codes [O, I] and zeros [O, G] counted from 0, scales [O, G] as they are stored."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """Return what the codes stand for, [O, I], float64."""
        group_size = self.codes.shape[1] // self.scales.shape[1]
        zeros, scales = (np.repeat(part.astype(np.float64), group_size, axis=1) for part in (self.zeros, self.scales))
        return (self.codes - zeros) * scales


@dataclass(frozen=True, slots=True)
class Form:
    """How matrices are stored. `group_size` None: one group. `writer` gives a module's tensors by their last names."""

    writer: Callable[["Form", Codes], dict[str, np.ndarray]]
    config: dict[str, Any]
    bits: int = 4
    group_size: int | None = 8
    symmetric: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """Two folders of one model, and its matrices by module."""

    folder: Path
    plain: Path
    matrices: dict[str, Codes]

    def edit(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the stored tensors of the quantized folder."""
        tensors = load_file(self.folder / WEIGHTS)
        change(tensors)
        save_file(tensors, self.folder / WEIGHTS, metadata={"format": "pt"})


def write_quantized(form: Form, family: str, root: Path, **options: Any) -> QuantizedCheckpoint:
    """Write a checkpoint of a family with every matrix of its layers but routers in the given form."""
    plain, folder = (build_checkpoint(family, root / name, **options) for name in ("plain", "quantized"))
    numbers = load_file(plain / WEIGHTS)
    stored, matrices = dict(numbers), {}
    generator = np.random.default_rng(7)
    for name in [name for name in numbers if MATRICES.search(name)]:
        module = name.removesuffix(".weight")
        matrix = matrices[module] = round_matrix(form, stored.pop(name).numpy(), generator)
        numbers[name] = torch.from_numpy(matrix.numbers.astype(np.float32))
        stored |= {f"{module}.{part}": torch.from_numpy(array) for part, array in form.writer(form, matrix).items()}
    save_file(numbers, plain / WEIGHTS, metadata={"format": "pt"})
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, quantization_config=form.config)
    return QuantizedCheckpoint(folder, plain, matrices)


def round_matrix(form: Form, weight: np.ndarray, generator: np.random.Generator) -> Codes:
    """Round a matrix, [O, I], and spoil some codes, so that all of them occur, the extreme ones too."""
    groups = weight.astype(np.float64).reshape(weight.shape[0], -1, form.group_size or weight.shape[1])
    last, middle = 2**form.bits - 1, 2 ** (form.bits - 1)
    if form.symmetric:
        scales = np.abs(groups).max(-1) / (middle - 1)
        zeros = np.full(scales.shape, middle)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = (high - low) / last
        zeros = np.clip(np.rint(-low / scales), 0, last)
    scales = scales.astype(np.float16)
    codes = np.clip(np.rint(groups / scales.astype(np.float64)[..., None]) + zeros[..., None], 0, last)
    codes = codes.reshape(weight.shape).astype(np.int64)
    spoilt = generator.random(codes.shape) < 0.01
    codes[spoilt] = generator.integers(0, last + 1, int(spoilt.sum()))
    codes.flat[0], codes.flat[-1] = 0, last
    return Codes(codes, zeros.astype(np.int64), scales)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis into words of 32 bits, the first code lowest; what is left of the last word is 0."""
    per_word = 32 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    words = np.zeros((*codes.shape[:-1], padded.shape[-1] // per_word), np.uint32)
    for place in range(per_word):
        words |= padded[..., place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def _gptq(form: Form, matrix: Codes) -> dict[str, np.ndarray]:
    less = 1 if form.config.get("checkpoint_format", "gptq") == "gptq" else 0
    num_inputs = matrix.codes.shape[1]
    stored = {
        "qweight": pack_words(matrix.codes, form.bits).T,
        "qzeros": pack_words((matrix.zeros.T - less) % 2**form.bits, form.bits),
        "scales": matrix.scales.T,
    }
    if form.options.get("g_idx", True):
        stored["g_idx"] = (np.arange(num_inputs) // (form.group_size or num_inputs)).astype(np.int32)
    return {name: np.ascontiguousarray(array) for name, array in stored.items()}


def _awq(form: Form, matrix: Codes) -> dict[str, np.ndarray]:
    def packed(rows: np.ndarray) -> np.ndarray:
        eights = rows.reshape(rows.shape[0], -1, 8)[..., AWQ_ORDER]
        return pack_words(eights.reshape(rows.shape), 4)

    scales = np.ascontiguousarray(matrix.scales.T)
    return {"qweight": packed(matrix.codes.T), "qzeros": packed(matrix.zeros.T), "scales": scales}


def _compressed_packed(form: Form, matrix: Codes) -> dict[str, np.ndarray]:
    stored = {
        "weight_packed": pack_words(matrix.codes, form.bits),
        "weight_scale": matrix.scales.astype(np.float32),
        "weight_shape": np.array(matrix.codes.shape),
    }
    if not form.symmetric:
        stored["weight_zero_point"] = np.ascontiguousarray(pack_words(matrix.zeros.T, form.bits).T)
    return stored


def _compressed_int8(form: Form, matrix: Codes) -> dict[str, np.ndarray]:
    stored = {"weight": (matrix.codes - 128).astype(np.int8), "weight_scale": matrix.scales}
    if not form.symmetric:
        stored["weight_zero_point"] = (matrix.zeros - 128).astype(np.int8)
    return stored


def gptq(bits: int = 4, group_size: int | None = 8, symmetric: bool = True, **config: Any) -> Form:
    """Return the form of GPTQ; `g_idx=False` leaves the groups of inputs out."""
    options = {"g_idx": config.pop("g_idx", True)}
    stated = {"bits": bits, "group_size": group_size or -1, "sym": symmetric, "desc_act": False, **config}
    return Form(_gptq, {"quant_method": "gptq", **stated}, bits, group_size, symmetric, options)


def awq(group_size: int | None = 8, **config: Any) -> Form:
    """Return the form of AWQ."""
    stated = {"bits": 4, "group_size": group_size or -1, "zero_point": True, "version": "gemm", **config}
    return Form(_awq, {"quant_method": "awq", **stated}, 4, group_size, symmetric=False)


def compressed(
    form: str, bits: int, group_size: int | None = None, symmetric: bool = True, activations: bool = False
) -> Form:
    """Return a form of compressed-tensors, "int-quantized" or "pack-quantized"."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
    }
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": dynamic if activations else None}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*\.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    writer = _compressed_packed if form == "pack-quantized" else _compressed_int8
    return Form(writer, config, bits, group_size, symmetric)


FORMS: dict[str, Form] = {
    "gptq": gptq(),
    "gptq-asymmetric": gptq(symmetric=False),
    "gptq-one-group": gptq(group_size=None, desc_act=True),
    "gptq-8-bits": gptq(bits=8, group_size=16),
    "gptq-8-bits-asymmetric": gptq(bits=8, symmetric=False),
    "gptq-v2": gptq(symmetric=False, checkpoint_format="gptq_v2"),
    "gptq-without-g-idx": gptq(g_idx=False),
    "awq": awq(),
    "awq-one-group": awq(group_size=None),
    "compressed-4-bits": compressed("pack-quantized", 4, 8),
    "compressed-4-bits-asymmetric": compressed("pack-quantized", 4, 8, symmetric=False),
    "compressed-4-bits-per-channel": compressed("pack-quantized", 4),
    "compressed-groups-of-6": compressed("pack-quantized", 4, 6),
    "compressed-8-bits-packed": compressed("pack-quantized", 8),
    "compressed-8-bits-weights": compressed("int-quantized", 8),
    "compressed-8-bits-asymmetric": compressed("int-quantized", 8, 8, symmetric=False),
}
"""Forms whose activations stay as they are."""

ROUNDED_FORMS: dict[str, Form] = {
    "compressed-int8": compressed("int-quantized", 8, activations=True),
    "compressed-int8-groups": compressed("int-quantized", 8, 8, symmetric=False, activations=True),
}
"""Forms whose activations are rounded to 8 bits."""
