"""Checkpoints that hold codes: every form is read to the very numbers it stands for, and is the same model as these."""

from pathlib import Path

import numpy as np
import pytest
import torch

from support.host_memory import HostAllocator
from support.native_models import describe_native, ignore_progress, load_native, native_logits, transformers_logits
from support.quantized_checkpoints import (
    FORMS,
    ROUNDED_FORMS,
    QuantizedCheckpoint,
    compressed,
    gptq,
    write_quantized,
)
from zif.contract import Feature, QuantizedWeight, WeightScheme
from zif.models.decoder import Decoder
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps

TOLERANCE = 1e-4


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def elements(weight: QuantizedWeight) -> np.ndarray:
    """Decode a held weight by the contract's definition, element by element, in float64."""
    codes, scales = weight.codes.numpy().astype(np.int64), weight.scales.numpy().astype(np.float64)
    num_groups = scales.shape[-1]
    if weight.scheme.bits == 4:
        pairs = codes.reshape(*codes.shape[:-1], num_groups, -1)
        codes = np.concatenate((pairs & 15, pairs >> 4), axis=-1)
    else:
        codes = codes.reshape(*codes.shape[:-1], num_groups, -1)
    zeros = np.full(scales.shape, 8 if weight.scheme.bits == 4 else 0) if weight.zeros is None else weight.zeros.numpy()
    numbers = (codes - zeros[..., None]) * scales[..., None]
    return numbers.reshape(*numbers.shape[:-2], -1)


def held_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Load a model; return its tensors by name, those of codes each by itself."""
    held: dict[str, torch.Tensor] = {}
    load_decoder(
        describe_native(folder),
        ReferenceOps(),
        HostAllocator(),
        "cpu",
        ignore_progress,
        lambda name, tensor: held.setdefault(name, tensor.clone()),
    )
    return held


def held_weight(held: dict[str, torch.Tensor], name: str, scheme: WeightScheme) -> QuantizedWeight:
    return QuantizedWeight(scheme, held[f"{name}.codes"], held[f"{name}.scales"], held.get(f"{name}.zeros"))


def joined(written: QuantizedCheckpoint, layer: int, names: list[str]) -> np.ndarray:
    return np.concatenate([written.matrices[f"model.layers.{layer}.{name}"].numbers for name in names])


class RoundedOps(ReferenceOps):
    """Plain products of activations rounded as 8 bits would, in float64; `exact` outputs are left alone."""

    def __init__(self, exact: tuple[int, ...]) -> None:
        self._exact = exact

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if weight.shape[0] in self._exact:
            return super().linear(x, weight, bias)
        step = x.abs().amax(-1, keepdim=True) / 127
        rounded = torch.round(x / step).double() * step.double()
        product = rounded @ weight.double().T
        return (product if bias is None else product + bias).to(x.dtype)


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_numbers_that_codes_stand_for(name: str, tmp_path: Path) -> None:
    written = write_quantized(FORMS[name], "llama3", tmp_path)
    theirs = transformers_logits(written.plain, tokens(40))
    assert theirs.std() > 0.3
    torch.testing.assert_close(native_logits(written.folder, tokens(40)), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["gptq", "gptq-asymmetric", "awq", "compressed-4-bits", "compressed-8-bits-weights"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe", "gemma2"])
def test_families_that_join_matrices_otherwise(form: str, family: str, tmp_path: Path) -> None:
    written = write_quantized(FORMS[form], family, tmp_path)
    theirs = transformers_logits(written.plain, tokens(20))
    torch.testing.assert_close(native_logits(written.folder, tokens(20)), theirs, rtol=0, atol=3 * TOLERANCE)


@pytest.mark.parametrize("form", ROUNDED_FORMS)
@pytest.mark.parametrize(("family", "exact"), [("llama3", (288,)), ("qwen2", (288,)), ("qwen3_moe", (288, 8))])
def test_rounded_activations_are_those_of_a_float64_model(
    form: str, family: str, exact: tuple[int, ...], tmp_path: Path
) -> None:
    written = write_quantized(ROUNDED_FORMS[form], family, tmp_path)
    model = load_native(describe_native(written.plain))
    assert isinstance(model, Decoder)
    model._ops = RoundedOps(exact)
    plain = native_logits(written.plain, tokens(20))
    ours, expected = native_logits(written.folder, tokens(20)), logits_of(model, tokens(20))
    assert (expected - plain).abs().mean() > 30 * (ours - expected).abs().mean(), "rounding shows, and is the same"


def logits_of(model: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    from support.dense_attention import DenseAttention

    with torch.inference_mode():
        return model.logits(model.forward(token_ids, torch.arange(len(token_ids)), DenseAttention()))


@pytest.mark.parametrize("name", [*FORMS, *ROUNDED_FORMS])
def test_held_codes_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    form = (FORMS | ROUNDED_FORMS)[name]
    written = write_quantized(form, "llama3", tmp_path)
    held = held_weights(written.folder)
    scheme = WeightScheme(form.bits, form.group_size, not form.symmetric, name in ROUNDED_FORMS)
    if name == "gptq-one-group" or name.endswith("per-channel"):
        assert held["layers.0.qkv.scales"].shape == (96, 1)
    for layer in (0, 2):
        qkv = joined(written, layer, [f"self_attn.{part}_proj" for part in "qkv"])
        gate_up = joined(written, layer, ["mlp.gate_proj", "mlp.up_proj"])
        assert np.array_equal(elements(held_weight(held, f"layers.{layer}.qkv", scheme)), qkv)
        assert np.array_equal(elements(held_weight(held, f"layers.{layer}.gate_up", scheme)), gate_up)


def test_held_codes_of_experts_are_the_stored_ones(tmp_path: Path) -> None:
    written = write_quantized(FORMS["awq"], "qwen3_moe", tmp_path)
    held, scheme = held_weights(written.folder), WeightScheme(4, 8, zero_points=True)
    for expert in (0, 7):
        names = [f"mlp.experts.{expert}.{part}_proj" for part in ("gate", "up")]
        gate_up = elements(held_weight(held, "layers.2.gate_up", scheme))[expert]
        assert np.array_equal(gate_up, joined(written, 2, names))
        down = elements(held_weight(held, "layers.2.down", scheme))[expert]
        assert np.array_equal(down, joined(written, 2, [f"mlp.experts.{expert}.down_proj"]))
    assert held["layers.2.router"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "feature", "scheme"),
    [
        ("gptq", Feature.QUANTIZATION_W4A16, "W4A16 in groups of 8"),
        ("gptq-8-bits", Feature.QUANTIZATION_W8A16, "W8A16 in groups of 16"),
        ("compressed-8-bits-packed", Feature.QUANTIZATION_W8A16, "W8A16"),
        ("compressed-int8", Feature.QUANTIZATION_W8A8, "W8A8"),
    ],
)
def test_description_names_the_scheme(name: str, feature: Feature, scheme: str, tmp_path: Path) -> None:
    written = write_quantized((FORMS | ROUNDED_FORMS)[name], "llama3", tmp_path)
    description = describe_native(written.folder)
    assert description.features == {Feature.ATTENTION_FULL, feature}
    assert (description.weight_schemes, description.quantization) == ((scheme,), None)
    assert describe_native(written.plain).weight_schemes == ()


@pytest.mark.parametrize("name", ["gptq-asymmetric", "awq", "compressed-4-bits", "compressed-int8"])
def test_described_bytes_are_those_held(name: str, tmp_path: Path) -> None:
    written = write_quantized((FORMS | ROUNDED_FORMS)[name], "qwen3_moe", tmp_path)
    description, allocator = describe_native(written.folder), HostAllocator()
    heard: list[tuple[int, int]] = []
    load_decoder(description, ReferenceOps(), allocator, "cpu", lambda done, total: heard.append((done, total)))
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert heard == sorted(heard)
    assert heard[-1] == (description.weight_bytes, description.weight_bytes)
    assert description.weight_bytes < describe_native(written.plain).weight_bytes


def test_matrices_in_schemes_of_their_own(tmp_path: Path) -> None:
    """Attention in 8 bits with activations, MLPs in packed 4 bits: two groups of one checkpoint."""
    int8, packed = ROUNDED_FORMS["compressed-int8"], FORMS["compressed-4-bits"]
    written = write_quantized(packed, "llama3", tmp_path / "packed")
    other = write_quantized(int8, "llama3", tmp_path / "int8")
    from safetensors.torch import load_file

    from support.checkpoints import edit_config

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".self_attn." in name]:
            del tensors[name]
        stored = load_file(other.folder / "model.safetensors")
        tensors.update({name: tensor for name, tensor in stored.items() if ".self_attn." in name})

    written.edit(replace)
    groups = {
        "group_0": {**packed.config["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {**int8.config["config_groups"]["group_0"], "targets": [r"re:.*self_attn\..*"]},
    }
    edit_config(
        written.folder,
        quantization_config={**packed.config, "format": "mixed-precision", "config_groups": groups},
    )
    assert describe_native(written.folder).weight_schemes == ("W8A8", "W4A16 in groups of 8")
    held = held_weights(written.folder)
    qkv = elements(held_weight(held, "layers.1.qkv", WeightScheme(8, dynamic_activations=True)))
    assert np.array_equal(qkv, joined(other, 1, [f"self_attn.{part}_proj" for part in "qkv"]))
    down = elements(held_weight(held, "layers.1.down", WeightScheme(4, 8)))
    assert np.array_equal(down, joined(written, 1, ["mlp.down_proj"]))


def test_inputs_that_fill_no_word(tmp_path: Path) -> None:
    """The last word of a row is not full: 20 inputs of 4 bits, 2.5 words."""
    form = compressed("pack-quantized", 4, 4)
    written = write_quantized(form, "llama3", tmp_path, hidden_size=40, intermediate_size=20)
    theirs = transformers_logits(written.plain, tokens(10))
    torch.testing.assert_close(native_logits(written.folder, tokens(10)), theirs, rtol=0, atol=TOLERANCE)


def test_biases_of_zeros_that_some_writers_store(tmp_path: Path) -> None:
    written = write_quantized(gptq(), "llama3", tmp_path)
    before = native_logits(written.folder, tokens(5))
    written.edit(lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.bias": torch.zeros(48)}))
    assert torch.equal(native_logits(written.folder, tokens(5)), before)


def test_a_quantized_output_matrix(tmp_path: Path) -> None:
    form = gptq(symmetric=False, lm_head=True)
    written = write_quantized(form, "llama3", tmp_path)
    from support.quantized_checkpoints import round_matrix

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        matrix = round_matrix(form, tensors.pop("lm_head.weight").numpy(), np.random.default_rng(0))
        written.matrices["lm_head"] = matrix
        tensors.update({f"lm_head.{k}": torch.from_numpy(v) for k, v in form.writer(form, matrix).items()})

    written.edit(replace)
    held = held_weights(written.folder)
    numbers = elements(held_weight(held, "lm_head", WeightScheme(4, 8, zero_points=True)))
    assert np.array_equal(numbers, written.matrices["lm_head"].numbers)
