"""What is not served of quantized checkpoints is refused by name: configurations before any weight, files by tensor."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import build_checkpoint, edit_config
from support.host_memory import HostAllocator
from support.native_models import describe_native, load_native, native_logits, transformers_logits
from support.quantized_checkpoints import FORMS, ROUNDED_FORMS, Form, QuantizedCheckpoint, awq, gptq, write_quantized
from zif.errors import CheckpointError, ConfigError, ModelError
from zif.models.description import ModelSource, describe_model

WEIGHTS, ACTIVATIONS = "config_groups.group_0.weights", "config_groups.group_0.input_activations"
DOWN = "model.layers.1.mlp.down_proj"


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Copy a configuration with one value replaced, found by a dotted path."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return config


CONFIGS: list[tuple[str, str, object, str]] = [
    ("gptq", "bits", 3, "weights of 3 bits are not implemented"),
    ("gptq", "bits", 2, "weights of 2 bits"),
    ("gptq", "bits", "4", "bits='4' must be a positive integer"),
    ("gptq", "group_size", 7, "groups of 7 inputs"),
    ("gptq", "group_size", 0, "group_size=0 must be"),
    ("gptq", "group_size", 64, "cannot hold 48 inputs"),
    ("gptq", "desc_act", True, "act order.*desc_act=False"),
    ("gptq", "checkpoint_format", "marlin", "checkpoint_format 'marlin'"),
    ("gptq", "is_marlin_format", True, "'marlin'"),
    ("gptq", "dynamic", {r"+:.*down_proj": {"bits": 8}}, "dynamic gives"),
    ("awq", "version", "gemv", "AWQ version 'gemv'"),
    ("awq", "zero_point", False, "zero_point=False"),
    ("awq", "bits", 8, "AWQ of 8 bits"),
    ("compressed-4-bits", "format", "float-quantized", "format 'float-quantized'"),
    ("compressed-4-bits", "format", "nvfp4-pack-quantized", "format 'nvfp4-pack-quantized'"),
    ("compressed-4-bits", "format", "marlin-24", "format 'marlin-24'"),
    ("compressed-4-bits", "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is not implemented"),
    ("compressed-4-bits", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config of format 'sparse-24"),
    ("compressed-4-bits", "transform_config", {"config_groups": {}}, "transform_config"),
    ("compressed-4-bits", "config_groups", {}, "config_groups"),
    ("compressed-4-bits", f"{WEIGHTS}.num_bits", 2, "weights of 2 bits"),
    ("compressed-4-bits", f"{WEIGHTS}.type", "float", "type 'float'"),
    ("compressed-4-bits", f"{WEIGHTS}.strategy", "tensor", "strategy 'tensor'"),
    ("compressed-4-bits", f"{WEIGHTS}.strategy", "block", "strategy 'block'"),
    ("compressed-4-bits", f"{WEIGHTS}.actorder", "group", "actorder='group'.*act order"),
    ("compressed-4-bits", f"{WEIGHTS}.dynamic", True, "dynamic=True"),
    ("compressed-4-bits", f"{WEIGHTS}.group_size", 5, "groups of 5 inputs"),
    ("compressed-4-bits", "config_groups.group_0.output_activations", {"num_bits": 8}, "output_activations"),
    ("compressed-4-bits", "config_groups.group_0.targets", ["re:.*nothing"], "no config_groups target matches"),
    ("compressed-4-bits", "config_groups.group_0.targets", ["re:("], r"targets=\['re:\('\] must be"),
    ("compressed-4-bits", "ignore", [DOWN], f"ignore lists '{DOWN}'"),
    ("compressed-4-bits", ACTIVATIONS, {"num_bits": 8, "dynamic": True}, "packed weights with activations of 8 bits"),
    ("compressed-int8", f"{ACTIVATIONS}.dynamic", False, "'dynamic': False.* are not implemented"),
    ("compressed-int8", f"{ACTIVATIONS}.symmetric", False, "'symmetric': False"),
    ("compressed-int8", f"{ACTIVATIONS}.strategy", "tensor", "'strategy': 'tensor'"),
    ("compressed-int8", f"{ACTIVATIONS}.type", "float", "'type': 'float'"),
    ("compressed-int8", f"{ACTIVATIONS}.num_bits", 4, "'num_bits': 4"),
    ("compressed-int8", f"{WEIGHTS}.num_bits", 4, "codes of 4 bits that are not packed"),
]


@pytest.mark.parametrize(("name", "path", "value", "reason"), CONFIGS)
def test_configurations_are_refused_by_name(
    name: str, path: str, value: object, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = (FORMS | ROUNDED_FORMS)[name]
    written = write_quantized(form, "llama3", tmp_path)
    edit_config(written.folder, quantization_config=changed(form.config, path, value))
    monkeypatch.setattr("os.preadv", lambda *arguments: pytest.fail("a weight was read"))
    with pytest.raises(ModelError, match=reason) as error:
        describe_native(written.folder)
    assert any(word in str(error.value) for word in ("use ", "correct ")), "no next step"


@pytest.mark.parametrize(
    "method", ["fp8", "fbgemm_fp8", "bitsandbytes", "hqq", "aqlm", "quanto", "torchao", "modelopt", "mxfp4"]
)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"'{method}' is not implemented.*awq, compressed-tensors, gptq.*int8"):
        describe_native(folder)


def test_modules_left_out_by_dynamic_may_be(tmp_path: Path) -> None:
    written = write_quantized(gptq(dynamic={"-:.*lm_head": {}}), "llama3", tmp_path)
    assert describe_native(written.folder).weight_schemes == ("W4A16 in groups of 8",)


def test_weights_of_codes_are_not_rounded_again(tmp_path: Path) -> None:
    written = write_quantized(awq(), "llama3", tmp_path)
    with pytest.raises(ConfigError, match=r"quantization='int8'.*codes already \(awq\): leave it out"):
        describe_model(ModelSource(written.folder, quantization="int8"))


@pytest.mark.parametrize("form", [awq(), gptq(), FORMS["compressed-4-bits"]])
def test_a_configuration_without_codes(form: Form, tmp_path: Path) -> None:
    written = write_quantized(form, "llama3", tmp_path)
    edit_config(written.plain, quantization_config=form.config)
    with pytest.raises(ModelError, match="the file holds no codes of that kind"):
        describe_native(written.plain)


def make_plain(written: QuantizedCheckpoint, module: str) -> None:
    """Store the numbers of one module in place of its codes."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.from_numpy(written.matrices[module].numbers).float()

    written.edit(change)


def test_matrices_that_are_multiplied_as_one_are_quantized_alike(tmp_path: Path) -> None:
    written = write_quantized(gptq(), "llama3", tmp_path)
    make_plain(written, "model.layers.1.self_attn.k_proj")
    with pytest.raises(ModelError, match=r"q_proj.*'layers\.1\.qkv'.*W4A16 in groups of 8 and not quantized"):
        describe_native(written.folder)


def test_a_matrix_of_its_own_may_be_plain(tmp_path: Path) -> None:
    written = write_quantized(gptq(), "llama3", tmp_path)
    bytes_before = describe_native(written.folder).weight_bytes
    make_plain(written, DOWN)
    assert describe_native(written.folder).weight_bytes == bytes_before + 48 * 96 * 4 - 48 * (96 // 2 + 96 // 8 * 4)
    theirs = transformers_logits(written.plain, torch.arange(20))
    torch.testing.assert_close(native_logits(written.folder, torch.arange(20)), theirs, rtol=0, atol=1e-4)


def test_experts_are_quantized_together(tmp_path: Path) -> None:
    written = write_quantized(gptq(), "mixtral", tmp_path)
    for expert in range(4):
        make_plain(written, f"model.layers.1.block_sparse_moe.experts.{expert}.w2")
    with pytest.raises(ModelError, match=r"experts of 'layers\.1' one matrix is quantized and one is not"):
        describe_native(written.folder)


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(f"{DOWN}.{name}")


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({f"{DOWN}.{name}": change(tensors[f"{DOWN}.{name}"]).contiguous()})


def fill_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


HEADERS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("gptq", drop("scales"), "missing: .*down_proj.scales"),
    ("gptq", drop("qzeros"), "missing: .*down_proj.qzeros"),
    ("awq", replace("qweight", lambda t: t[:, :-1]), "of another shape .*down_proj.qweight"),
    ("awq", replace("qweight", lambda t: t.float()), "of a dtype that is not read: .*down_proj.qweight"),
    ("compressed-4-bits", drop("weight_scale"), "missing: .*down_proj.weight_scale"),
    ("compressed-4-bits", replace("weight_scale", lambda t: t[:, 1:]), "of another shape .*down_proj.weight_scale"),
    ("compressed-4-bits-asymmetric", drop("weight_zero_point"), "missing: .*down_proj.weight_zero_point"),
    ("compressed-int8", replace("weight", lambda t: t.float()), "of a dtype that is not read: .*down_proj.weight"),
    ("compressed-int8", drop("weight_scale"), "of a dtype that is not read: .*down_proj.weight"),
    (
        "compressed-4-bits",
        lambda tensors: tensors.update({f"{DOWN}.weight_g_idx": torch.zeros(96, dtype=torch.int32)}),
        "unexpected: .*down_proj.weight_g_idx",
    ),
]


@pytest.mark.parametrize(("name", "change", "reason"), HEADERS)
def test_files_that_do_not_fit_are_named_before_loading(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], reason: str, tmp_path: Path
) -> None:
    written = write_quantized((FORMS | ROUNDED_FORMS)[name], "llama3", tmp_path)
    written.edit(change)
    with pytest.raises((CheckpointError, ModelError), match=reason):
        describe_native(written.folder)


CONTENTS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("gptq", replace("g_idx", lambda t: t.flip(0)), r"down_proj\.g_idx.*act order"),
    ("gptq", replace("scales", fill_one(float("nan"))), r"down_proj\.scales.*not finite"),
    ("gptq", replace("qzeros", fill_one(0)), r"down_proj\.qzeros.*sym=true"),
    ("gptq", lambda t: t.update({f"{DOWN}.bias": torch.ones(48)}), r"down_proj\.bias' is not zero"),
    ("compressed-4-bits", replace("weight_shape", fill_one(95)), r"down_proj\.weight_shape' says \[48, 95\]"),
    ("compressed-int8", replace("weight_scale", fill_one(float("inf"))), r"down_proj\.weight_scale.*not finite"),
    ("awq", replace("scales", fill_one(float("-inf"))), r"down_proj\.scales.*not finite"),
]


@pytest.mark.parametrize(("name", "change", "reason"), CONTENTS)
def test_spoilt_tensors_are_named_and_leave_nothing_allocated(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], reason: str, tmp_path: Path
) -> None:
    written = write_quantized((FORMS | ROUNDED_FORMS)[name], "llama3", tmp_path)
    written.edit(change)
    allocator = HostAllocator()
    with pytest.raises(CheckpointError, match=reason):
        load_native(describe_native(written.folder), allocator)
    assert allocator.stats().allocated_bytes == 0
