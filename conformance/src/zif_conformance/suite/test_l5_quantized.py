"""L5, weights held as integers: a model computes with the numbers that codes stand for, however a file packs them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zif import LLM
from zif.contract import Feature
from zif.errors import ConfigError, ModelError, PlanRefusedError
from zif_conformance.marks import conforms, exercises
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import FAMILIES, VOCAB_SIZE, break_weights, write_checkpoint
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens
from zif_conformance.tiny_models.quantized import (
    FORMATS,
    QuantizedCheckpoint,
    declare_quantization,
    write_packed_codes,
    write_rounded,
)

_FULL = (Feature.ATTENTION_FULL,)
_INT8 = (Feature.QUANTIZATION_W8A8,)
_INT4 = (Feature.QUANTIZATION_W4A16, *_INT8)
_MODULE = "model.layers.1.mlp.down_proj"
_BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

Spoil = Callable[[dict[str, torch.Tensor], str], object]
"""Breaks tensors, given the name of the scales of one matrix."""


def by_format(*names: str) -> pytest.MarkDecorator:
    """Return a mark that runs a test for formats whose feature is claimed (none named: all)."""
    chosen = names or tuple(FORMATS)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=exercises(FORMATS[name].scheme.feature), id=name) for name in chosen]
    )


@conforms(level="L5", gate="G7", clause=("9.6", "9.8", "10.2"), claims=_FULL)
@by_format()
def test_codes_are_the_numbers_they_stand_for(
    tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, name: str
) -> None:
    _hold_model(tiny, record_gate, write_packed_codes(tmp_path, tiny.capabilities, name))


@conforms(level="L5", gate="G7", clause=("9.6", "9.8", "10.2"))
@pytest.mark.parametrize(
    ("family", "bits"),
    [
        pytest.param("dense", 8, marks=exercises(*FAMILIES["dense"].features, *_INT8), id="dense-int8"),
        pytest.param("dense", 4, marks=exercises(*FAMILIES["dense"].features, *_INT4), id="dense-int4"),
        pytest.param("experts", 4, marks=exercises(*FAMILIES["experts"].features, *_INT4), id="experts-int4"),
    ],
)
def test_weights_are_rounded_on_load(
    tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, family: str, bits: int
) -> None:
    checkpoint = write_rounded(tmp_path, tiny.capabilities, family, bits)
    _hold_model(tiny, record_gate, checkpoint, quantization=f"int{bits}")


@conforms(level="L5", clause="9.8", claims=_FULL, negative=True)
@by_format("compressed-w8a8", "compressed-w4a16", "gptq-w4a16-zeros", "awq-w4a16-zeros")
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda tensors, scales: tensors.pop(scales), id="missing"),
        pytest.param(lambda tensors, scales: tensors.update({scales: tensors[scales][:-1].contiguous()}), id="shape"),
        pytest.param(lambda tensors, scales: tensors.update({scales: tensors[scales].to(torch.int32)}), id="dtype"),
        pytest.param(lambda tensors, scales: tensors[scales][0].fill_(torch.nan), id="not-a-number"),
    ],
)
def test_spoilt_scales_are_refused(tiny: TinyModels, tmp_path: Path, name: str, spoil: Spoil) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = write_packed_codes(tmp_path, tiny.capabilities, name)
    tensors = load_file(checkpoint.tensors)
    (scales,) = {f"{_MODULE}.weight_scale", f"{_MODULE}.scales"} & tensors.keys()
    spoil(tensors, scales)
    save_file(tensors, checkpoint.tensors, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=_MODULE):
        LLM(**tiny.settings(checkpoint.held))


@conforms(level="L5", clause=("9.8", "4.2"), claims=_FULL, negative=True)
@pytest.mark.parametrize("name", FORMATS)
def test_a_scheme_that_is_not_claimed_is_refused_by_name(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    """Broken codes are met only where the scheme is claimed: whoever refuses it does so before reading any."""
    checkpoint, feature = write_packed_codes(tmp_path, tiny.capabilities, name), FORMATS[name].scheme.feature
    break_weights(checkpoint.held)
    claimed = feature in tiny.capabilities.features
    with pytest.raises(ModelError if claimed else PlanRefusedError, match="'model." if claimed else feature.value):
        LLM(**tiny.settings(checkpoint.held))


@conforms(level="L5", clause=("9.8", "4.2"), claims=_FULL, negative=True)
@pytest.mark.parametrize(("bits", "features"), [(8, _INT8), (4, _INT4)], ids=["int8", "int4"])
def test_rounding_that_is_not_claimed_is_refused_by_name(
    tiny: TinyModels, tmp_path: Path, bits: int, features: tuple[Feature, ...]
) -> None:
    folder = write_rounded(tmp_path, tiny.capabilities, "dense", bits).held
    break_weights(folder)
    missing = [feature for feature in features if feature not in tiny.capabilities.features]
    with pytest.raises(PlanRefusedError if missing else ModelError) as refused:
        LLM(**tiny.settings(folder, quantization=f"int{bits}"))
    assert all(feature.value in str(refused.value) for feature in missing), refused.value


def _compressed(**changes: Any) -> dict[str, Any]:
    """Return what a checkpoint of compressed-tensors says, with changes to its only group."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **changes.pop("weights", {})}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": _BY_TOKEN, **changes.pop("group", {})}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        **changes,
    }


_UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "hqq": ({"quant_method": "hqq", "nbits": 4}, "hqq"),
    "compressed-float": (_compressed(format="float-quantized"), "float-quantized"),
    "compressed-nvfp4": (_compressed(format="nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
    "compressed-sparse": (_compressed(format="marlin-24"), "marlin-24"),
    "compressed-static": (_compressed(group={"input_activations": {**_BY_TOKEN, "dynamic": False}}), "dynamic"),
    "compressed-tensor": (_compressed(weights={"strategy": "tensor"}), "tensor"),
    "compressed-3-bits": (_compressed(weights={"num_bits": 3}), "3 bits"),
    "compressed-act-order": (_compressed(weights={"actorder": "group"}), "act order"),
    "compressed-kv": (_compressed(kv_cache_scheme={"num_bits": 8, "type": "float"}), "kv_cache_scheme"),
    "gptq-3-bits": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "3 bits"),
    "gptq-act-order": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, "desc_act"),
    "gptq-marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
    "awq-gemv": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
    "awq-symmetric": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}, "zero_point"),
}


@conforms(level="L5", clause="9.8", claims=_FULL, negative=True)
@pytest.mark.parametrize("name", _UNSERVED)
def test_schemes_that_nobody_serves_are_refused_by_name(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    config, said = _UNSERVED[name]
    folder = write_checkpoint("dense", tmp_path, tiny.capabilities)
    declare_quantization(folder, config)
    break_weights(folder)
    with pytest.raises(ModelError, match=said):
        LLM(**tiny.settings(folder))


@conforms(level="L5", clause="9.8", claims=_FULL, negative=True)
@pytest.mark.parametrize("rounding", ["int8", "int4"])
def test_codes_are_not_rounded_again(tiny: TinyModels, tmp_path: Path, rounding: str) -> None:
    checkpoint = write_packed_codes(tmp_path, tiny.capabilities, "gptq-w4a16")
    break_weights(checkpoint.held)
    with pytest.raises(ConfigError, match=rounding):
        LLM(**tiny.settings(checkpoint.held, quantization=rounding))


def _hold_model(tiny: TinyModels, record_gate: GateRecorder, checkpoint: QuantizedCheckpoint, **changes: Any) -> None:
    """Assert gate G7 for answers to a mixed batch, and for the log-probabilities of a prompt."""
    prompts, scored = [prompt_tokens(30), prompt_tokens(9, 1), prompt_tokens(1, 2)], prompt_tokens(40, 3)
    with LLM(**tiny.settings(checkpoint.held, **changes)) as opened:
        outputs = answer(opened, prompts, greedy(16))
        (output,) = answer(opened, [scored], greedy(1, prompt_logprobs=VOCAB_SIZE))
    truth = checkpoint.truth(tiny.dtype)
    hold_answers(truth, record_gate, outputs, 16)
    assert output.prompt_logprobs is not None
    rows = [[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in output.prompt_logprobs[1:] if entry]
    truth.hold_logprobs(record_gate, scored[:-1], torch.tensor(rows))
