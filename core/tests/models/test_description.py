"""What planning is told about a model: from headers alone, without torch, and true."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.checkpoints import FAMILIES, build_checkpoint, build_tied_checkpoint, edit_config
from support.native_models import describe_native
from zif.contract import Feature, FullAttentionSpec, SlidingWindowSpec
from zif.errors import CheckpointError, ConfigError, ModelError, UnknownArchitectureError
from zif.models.description import ModelSource, describe_model
from zif.models.families import BUILDERS


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_are_those_of_the_tensors(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert describe_native(folder).weight_bytes == stored
    assert describe_native(folder, dtype="bfloat16").weight_bytes == stored // 2


def test_tied_output_matrix_counts_once(tmp_path: Path) -> None:
    folder = build_tied_checkpoint("llama3", tmp_path / "tied")
    untied = build_checkpoint("llama3", tmp_path / "untied")
    assert describe_native(untied).weight_bytes - describe_native(folder).weight_bytes == 288 * 48 * 4


@pytest.mark.parametrize("named_for", ["decoder", "language model"])
def test_an_output_matrix_that_was_left_out_on_purpose_is_not_missed(named_for: str, tmp_path: Path) -> None:
    folder = build_checkpoint("qwen3_moe", tmp_path)
    whole = describe_native(folder)
    tensors = load_file(folder / "model.safetensors")
    output_bytes = tensors.pop("lm_head.weight").nbytes
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
        describe_native(folder)
    if named_for == "decoder":
        save_file({n.removeprefix("model."): tensor for n, tensor in tensors.items()}, folder / "model.safetensors")
    else:
        (folder / "modules.json").write_text("[]")
    bare = describe_native(folder)
    assert bare == replace(whole, architecture="Qwen3MoeModel", weight_bytes=whole.weight_bytes - output_bytes)


def test_uniform_layers_are_one_group(tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("qwen3", tmp_path))
    assert description.kv_specs == (FullAttentionSpec((0, 1, 2), 2, 16, 16, "float32"),)
    assert description.features == {Feature.ATTENTION_FULL}
    assert (description.architecture, description.implementation) == ("Qwen3ForCausalLM", "native")
    assert (description.vocab_size, description.max_model_len) == (288, 512)


def test_alternating_layers_are_two_groups_full_first(tmp_path: Path) -> None:
    source = ModelSource(build_checkpoint("gpt_oss", tmp_path), dtype="bfloat16", block_size=8)
    description = describe_model(source)
    assert description.kv_specs == (
        FullAttentionSpec((1, 3), 2, 16, 8, "bfloat16"),
        SlidingWindowSpec((0, 2), 2, 16, 8, "bfloat16", 12),
    )
    assert description.features == {
        Feature.ATTENTION_FULL,
        Feature.ATTENTION_SLIDING_WINDOW,
        Feature.ATTENTION_SINKS,
        Feature.MIXTURE_OF_EXPERTS,
    }


def test_kv_may_have_a_dtype_of_its_own(tmp_path: Path) -> None:
    folder = build_checkpoint("gpt_oss", tmp_path)
    plain = describe_model(ModelSource(folder, dtype="bfloat16"))
    coded = describe_model(ModelSource(folder, dtype="bfloat16", kv_dtype="int8"))
    assert {spec.dtype for spec in plain.kv_specs} == {"bfloat16"}
    assert coded == replace(plain, kv_specs=tuple(replace(spec, dtype="int8") for spec in plain.kv_specs))


def test_features_of_gemma2_name_the_soft_cap(tmp_path: Path) -> None:
    features = describe_native(build_checkpoint("gemma2", tmp_path)).features
    assert features == {Feature.ATTENTION_FULL, Feature.ATTENTION_SLIDING_WINDOW, Feature.ATTENTION_SOFTCAP}


def test_windows_only(tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("mistral", tmp_path))
    assert [spec.kind for spec in description.kv_specs] == ["sliding[12]"]
    assert description.features == {Feature.ATTENTION_SLIDING_WINDOW}


def test_dtype_is_the_one_the_configuration_names(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path, dtype="bfloat16")
    assert describe_native(folder).dtype == "bfloat16"
    edit_config(folder, removed=("dtype",), torch_dtype="torch.float16")
    assert describe_native(folder).dtype == "float16"
    edit_config(folder, removed=("torch_dtype",))
    assert describe_native(folder).dtype == "bfloat16", "what is stored"
    assert describe_native(folder, dtype="float32").dtype == "float32"


def test_dtypes_that_are_not_served(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    with pytest.raises(ConfigError, match="dtype='int8' is not served"):
        describe_native(folder, dtype="int8")
    edit_config(folder, dtype="float64")
    with pytest.raises(ModelError, match="dtype='float64' is not served"):
        describe_native(folder)


def test_max_model_len_within_the_model(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    assert describe_native(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds the 512 positions"):
        describe_native(folder, max_model_len=513)
    with pytest.raises(ConfigError, match="max_model_len=0 must be at least 1"):
        describe_native(folder, max_model_len=0)


def test_yarn_added_to_a_configuration_extends_it(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen2", tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    edit_config(folder, removed=("rope_parameters",), rope_scaling=scaling)
    assert describe_native(folder).max_model_len == 2048


def test_longrope_serves_more_than_its_original_length_when_asked(tmp_path: Path) -> None:
    folder = build_checkpoint("phi3_longrope", tmp_path)
    assert describe_native(folder).max_model_len == 64
    assert describe_native(folder, max_model_len=512).max_model_len == 512


def test_activation_estimates_grow_with_dtype_and_shape(tmp_path: Path) -> None:
    small = build_checkpoint("llama3", tmp_path / "small")
    wide = build_checkpoint("llama3", tmp_path / "wide", intermediate_size=960)
    assert describe_native(wide).token_activation_bytes > describe_native(small).token_activation_bytes
    narrow = describe_native(small, dtype="bfloat16")
    assert narrow.token_activation_bytes < describe_native(small).token_activation_bytes
    assert narrow.sample_activation_bytes >= 288 * 4


def test_block_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block_size=0"):
        describe_model(ModelSource(build_checkpoint("llama3", tmp_path), block_size=0))


@pytest.mark.parametrize("architectures", [None, [], ["A", "B"], "LlamaForCausalLM", [3]])
def test_architecture_must_be_named_once(architectures: object, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, architectures=architectures)
    with pytest.raises(ModelError, match="must name exactly one class"):
        describe_native(folder)


def test_unknown_architecture_lists_the_native_ones(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, architectures=["NovelForCausalLM"])
    with pytest.raises(UnknownArchitectureError, match="NovelForCausalLM") as error:
        describe_native(folder)
    assert all(name in str(error.value) for name in BUILDERS)


@pytest.mark.parametrize("implementation", ["auto", "transformers"])
def test_architecture_that_nobody_knows_names_both_ways(implementation: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, architectures=["NovelForCausalLM"], model_type="novel")
    with pytest.raises(UnknownArchitectureError, match=r"native decoder .*LlamaForCausalLM.* transformers"):
        describe_model(ModelSource(folder, implementation=implementation))


DESCRIBE_WITHOUT_TORCH = """
import sys
from pathlib import Path
from zif.models.description import ModelSource, describe_model
print(describe_model(ModelSource(Path(sys.argv[1]))).weight_bytes)
heavy = {"torch", "transformers", "tokenizers", "jax", "tensorflow"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_describing_imports_no_array_library(family: str, tmp_path: Path) -> None:
    folder = build_checkpoint(family, tmp_path)
    run = subprocess.run([sys.executable, "-c", DESCRIBE_WITHOUT_TORCH, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == describe_native(folder).weight_bytes
