"""Weights rounded to integers while they load: to the reference's codes, in every family, with little memory beside."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import FAMILIES, build_checkpoint, build_tied_checkpoint, edit_config
from support.dense_attention import DenseAttention
from support.host_memory import HostAllocator
from support.native_models import describe_native, ignore_progress, load_native, native_logits
from zif.contract import Feature, ModelDescription, QuantizedExperts, QuantizedWeight, WeightScheme
from zif.errors import CheckpointError, ConfigError, OutOfMemoryError
from zif.models.decoder import Decoder, Mlp, Moe
from zif.models.description import ModelSource, describe_model
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps
from zif.reference.quantization import dequantize, quantize

INT8 = WeightScheme(8, dynamic_activations=True)
WEIGHTS = "model.safetensors"


def describe(folder: Path, quantization: str | None, dtype: str = "auto") -> ModelDescription:
    return describe_model(ModelSource(folder, dtype=dtype, quantization=quantization, implementation="native"))


def load(folder: Path, quantization: str | None, dtype: str = "auto") -> Decoder:
    model = load_native(describe(folder, quantization, dtype))
    assert isinstance(model, Decoder)
    return model


def logits(model: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model.forward(token_ids, torch.arange(len(token_ids)), DenseAttention()))


def assert_codes(weight: object, numbers: torch.Tensor, scheme: WeightScheme) -> None:
    assert isinstance(weight, QuantizedWeight)
    expected = quantize(numbers.float(), scheme)
    assert weight.scheme == scheme
    assert torch.equal(weight.codes, expected.codes)
    assert torch.equal(weight.scales, expected.scales)
    assert weight.zeros is None


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("quantization", "scheme"), [("int8", INT8), ("int4", WeightScheme(4, 16))])
def test_codes_are_the_references(quantization: str, scheme: WeightScheme, stored: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path, dtype=stored)
    model, numbers = load(folder, quantization, "bfloat16"), load_file(folder / WEIGHTS)
    layer, prefix = model._layers[1], "model.layers.1"
    qkv = torch.cat([numbers[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert_codes(layer.attention.qkv.weight, qkv, scheme)
    assert_codes(layer.attention.output.weight, numbers[f"{prefix}.self_attn.o_proj.weight"], scheme)
    assert isinstance(layer.mlp, Mlp)
    gate_up = torch.cat([numbers[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert_codes(layer.mlp.gate_up.weight, gate_up, scheme)
    wider = WeightScheme(4, 32) if quantization == "int4" else scheme
    assert_codes(layer.mlp.down.weight, numbers[f"{prefix}.mlp.down_proj.weight"], wider)
    assert_codes(model._embedding, numbers["model.embed_tokens.weight"], INT8)
    assert_codes(model._lm_head.weight, numbers["lm_head.weight"], INT8)
    assert layer.attention_in_norm is not None
    assert layer.attention_in_norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_codes_of_experts_are_the_references(quantization: str, family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    plain, rounded = load(folder, None), load(folder, quantization)
    experts, expected = rounded._layers[2].mlp, plain._layers[2].mlp
    assert isinstance(experts, Moe)
    assert isinstance(expected, Moe)
    assert isinstance(experts.weights, QuantizedExperts)
    for held, numbers in (
        (experts.weights.gate_up, expected.weights.gate_up),
        (experts.weights.down, expected.weights.down),
    ):
        groups = {48: 16, 24: 8, 32: 32, 64: 32}
        scheme = INT8 if quantization == "int8" else WeightScheme(4, groups[numbers.shape[-1]])
        assert_codes(held, numbers, scheme)
    assert isinstance(experts.router.weight, torch.Tensor)
    assert torch.equal(experts.router.weight, expected.router.weight)
    if expected.weights.down_bias is not None:
        assert torch.equal(experts.weights.down_bias, expected.weights.down_bias)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.2), ("int4", 0.8)])
def test_every_family_computes_nearly_the_same(family: str, quantization: str, bound: float, tmp_path: Path) -> None:
    folder, prompt = build_checkpoint(family, tmp_path), torch.arange(24) * 7 % 256
    plain, rounded = native_logits(folder, prompt), logits(load(folder, quantization), prompt)
    error = (rounded - plain).square().mean().sqrt() / plain.std()
    assert 0 < error < bound, "of unrelated logits it is 1.4; these models are random, and amplify what is rounded"


def test_groups_that_do_not_divide_are_smaller_or_none(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path, intermediate_size=100)
    model = load(folder, "int4")
    mlp = model._layers[0].mlp
    assert isinstance(mlp, Mlp)
    assert isinstance(mlp.gate_up.weight, QuantizedWeight)
    assert isinstance(mlp.down.weight, QuantizedWeight)
    assert mlp.gate_up.weight.scheme == WeightScheme(4, 16), "48 inputs"
    assert mlp.down.weight.scheme == INT8, "100 inputs: groups of 4 would hold more scales than codes"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_tied_embedding_is_held_once(quantization: str, tmp_path: Path) -> None:
    folder = build_tied_checkpoint("llama3", tmp_path)
    model = load(folder, quantization)
    assert model._lm_head.weight is model._embedding
    ids = torch.tensor([0, 287, 3, 3])
    assert isinstance(model._embedding, QuantizedWeight)
    expected = dequantize(model._embedding, torch.float32)[ids]
    assert torch.equal(model._embed(ids), expected)
    assert load(folder, quantization, "bfloat16")._embed(ids).dtype == torch.bfloat16


def test_an_output_matrix_stored_twice_is_still_compared(tmp_path: Path) -> None:
    folder = build_tied_checkpoint("llama3", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is stored and differs"):
        load(folder, "int8")


def test_description_counts_codes_and_scales(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    description = describe(folder, "int8", "bfloat16")
    assert description.features == {Feature.ATTENTION_FULL, Feature.QUANTIZATION_W8A8}
    assert (description.quantization, description.weight_schemes) == ("int8", ("W8A8",))
    outputs_and_inputs = [(96, 48), (48, 48), (192, 48), (48, 96)] * 3 + [(288, 48)] * 2
    norms = (2 * 3 + 1) * 48 * 2
    assert description.weight_bytes == sum(o * i + 4 * o for o, i in outputs_and_inputs) + norms
    both = describe(folder, "int4")
    assert both.features == {Feature.ATTENTION_FULL, Feature.QUANTIZATION_W8A8, Feature.QUANTIZATION_W4A16}
    assert both.weight_schemes == ("W8A8", "W4A16 in groups of 16", "W4A16 in groups of 32")


@pytest.mark.parametrize("family", ["llama3", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_ledger_and_progress_tell_the_bytes_of_the_description(family: str, quantization: str, tmp_path: Path) -> None:
    description = describe(build_checkpoint(family, tmp_path), quantization)
    allocator, heard = HostAllocator(), []
    load_decoder(description, ReferenceOps(), allocator, "cpu", lambda done, total: heard.append((done, total)))
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert heard == sorted(heard)
    assert heard[-1] == (description.weight_bytes, description.weight_bytes)


def test_weights_that_do_not_fit_leave_nothing_allocated(tmp_path: Path) -> None:
    description = describe(build_checkpoint("llama3", tmp_path), "int4")
    allocator = HostAllocator(description.weight_bytes - 1)
    with pytest.raises(OutOfMemoryError):
        load_native(description, allocator)
    assert allocator.stats().allocated_bytes == 0


def test_packed_blocks_are_unpacked_and_rounded(tmp_path: Path) -> None:
    """MXFP4 experts are numbers once they are unpacked, and rounded like others."""
    from models.test_mxfp4 import QUANTIZATION, SHAPES, random_packed, unpack

    folder = build_checkpoint("gpt_oss", tmp_path)
    tensors, numbers = load_file(folder / WEIGHTS), {}
    for seed, name in enumerate(sorted(n for n in tensors if n.endswith(("gate_up_proj", "down_proj")))):
        blocks, scales = random_packed(SHAPES[name.rsplit(".", 1)[1]], seed)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers[name] = torch.from_numpy(unpack(blocks, scales)).float()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, quantization_config=QUANTIZATION)
    experts = load(folder, "int4")._layers[3].mlp
    assert isinstance(experts, Moe)
    assert isinstance(experts.weights, QuantizedExperts)
    assert_codes(experts.weights.down, numbers["model.layers.3.mlp.experts.down_proj"], WeightScheme(4, 32))
    gate_up = numbers["model.layers.3.mlp.experts.gate_up_proj"]
    assert_codes(experts.weights.gate_up, torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1), WeightScheme(4, 32))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    tensors, name = load_file(folder / WEIGHTS), "model.layers.2.mlp.up_proj.weight"
    tensors[name][-1, -1] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{name}' in .* not finite"):
        load(folder, "int8")


def test_what_is_kept_elsewhere_leaves_nothing_here(tmp_path: Path) -> None:
    """A runner that moves weights away is given codes and scales as tensors of their own."""
    description, allocator = describe(build_checkpoint("llama3", tmp_path), "int4"), HostAllocator()
    kept: dict[str, torch.Tensor] = {}
    model = load_decoder(
        description,
        ReferenceOps(),
        allocator,
        "cpu",
        ignore_progress,
        lambda name, tensor: kept.setdefault(name, tensor.clone()),
    )
    assert allocator.stats().allocated_bytes == 0
    assert sum(tensor.nbytes for tensor in kept.values()) == description.weight_bytes
    assert {"layers.0.qkv.codes", "layers.0.qkv.scales", "norm"} <= kept.keys()
    assert isinstance(model, Decoder)
    here = load_native(description)
    assert isinstance(here, Decoder)
    assert torch.equal(logits(model, torch.arange(9)), logits(here, torch.arange(9)))


def test_a_wrong_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization='fp8' is not served; use one of int8, int4"):
        describe(build_checkpoint("llama3", tmp_path), "fp8")


@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_the_transformers_backend_refuses(implementation: str, tmp_path: Path) -> None:
    family = "qwen3_next" if implementation == "auto" else "llama3"
    source = ModelSource(build_checkpoint(family, tmp_path), quantization="int8")
    with pytest.raises(ConfigError, match="quantization='int8' is served by native decoders only"):
        describe_model(replace(source, implementation=implementation))


MEASURE = """
import json, sys
from pathlib import Path
import models.test_rounding_on_load as tests
from support.native_models import load_native

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

description = tests.describe(Path(sys.argv[1]), sys.argv[2], "bfloat16")
before = status("VmRSS:")
model = load_native(description)
print(json.dumps({"growth": status("VmHWM:") - before, "weights": description.weight_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's count of resident memory")
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_peak_is_the_codes_and_little_more(quantization: str, tmp_path: Path) -> None:
    """Never the numbers that are rounded: those are 115 MB in bfloat16 here, four or two times the codes."""
    folder = build_checkpoint("llama3", tmp_path, num_hidden_layers=1, dtype="bfloat16")
    tensors = load_file(folder / WEIGHTS)
    rows = 400_000
    for name, shape in {"gate_proj": (rows, 48), "up_proj": (rows, 48), "down_proj": (48, rows)}.items():
        tensors[f"model.layers.0.mlp.{name}.weight"] = torch.randn(shape).bfloat16()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, intermediate_size=rows)
    paths = [str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{MEASURE}", str(folder), quantization]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["growth"] > 0.9 * measured["weights"], "the measurement sees the weights"
    assert measured["growth"] < measured["weights"] + (32 << 20)


def test_unquantized_models_are_described_as_before(tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("llama3", tmp_path))
    assert (description.quantization, description.weight_schemes) == (None, ())
