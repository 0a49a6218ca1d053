"""What is wrong with a model folder is said by name, before or while loading, and nothing stays allocated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import build_checkpoint, build_sharded_checkpoint, build_tied_checkpoint, edit_config
from support.host_memory import HostAllocator
from support.native_models import describe_native, ignore_progress, load_native, native_logits
from zif.contract import ModelDescription
from zif.errors import CheckpointError, OutOfMemoryError
from zif.models.checkpoint import open_checkpoint
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_headers_tell_what_the_library_tells(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    tensors = load_file(folder / WEIGHTS)
    stored = open_checkpoint(folder).tensors
    assert stored.keys() == tensors.keys()
    raw = (folder / WEIGHTS).read_bytes()
    for name, tensor in tensors.items():
        entry = stored[name]
        assert (entry.dtype, entry.shape, entry.num_bytes) == ("float32", tuple(tensor.shape), tensor.nbytes)
        assert raw[entry.offset : entry.offset + entry.num_bytes] == tensor.numpy().tobytes()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'.*nowhere' does not exist"):
        describe_native(tmp_path / "nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        describe_native(tmp_path)


@pytest.mark.parametrize(("content", "problem"), [(b"{", "not valid JSON"), (b"[]", "holds a list"), (b"\xff", "JSON")])
def test_config_that_is_no_object(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        describe_native(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        describe_native(folder)


def test_pickled_weights_only(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pickled weights only.*convert them with transformers: .*save_pretrained"
    ):
        describe_native(folder)


def test_shards_without_index(tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.safetensors' but no model\.safetensors\.index"):
        describe_native(folder)


def test_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"names the shard '{shard.name}', which is missing"):
        describe_native(folder)


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["model.extra.weight"] = first
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"'model\.extra\.weight' is in '{first}', which does not hold it"):
        describe_native(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]"])
def test_index_that_is_none(content: str, tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        describe_native(folder)


def test_index_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    (folder / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file of the same folder"):
        describe_native(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = build_sharded_checkpoint("llama3", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    shutil.copy(folder / shard, folder / "copy.safetensors")
    index["weight_map"][f"{name}.copy"] = "copy.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"is in '.*' and in '.*'"):
        describe_native(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is not a sound safetensors file"):
        describe_native(folder)


@pytest.mark.parametrize("position", [0, 7, 8, 9])
def test_bit_flips_in_the_header(position: int, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[position] ^= 0x81
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        describe_native(folder)


def test_file_cut_short_after_planning(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    description = describe_native(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    assert_load_fails(description, "not a sound safetensors file")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float, dtype: str, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path, dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[1234:1235].fill_(value))
    assert_load_fails(describe_native(folder), rf"'{name}' in '.*' has values that are not finite")


def test_largest_finite_values_are_fine(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    limits = torch.finfo(torch.float32)

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][:3] = torch.tensor([limits.max, limits.min, -0.0])

    edit_tensors(folder, fill)
    load_native(describe_native(folder))


def test_values_that_the_model_dtype_cannot_hold(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path, dtype="bfloat16")
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e20))
    assert_load_fails(describe_native(folder, dtype="float16"), r"'model\.norm\.weight'.*float16 cannot hold")


def test_missing_and_unexpected_tensors_are_named_together(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.w_pack.weight"] = tensors.pop("model.layers.0.self_attn.k_proj.weight")
        del tensors["model.norm.weight"]

    edit_tensors(folder, rename)
    with pytest.raises(CheckpointError) as error:
        describe_native(folder)
    message = str(error.value)
    assert "2 missing: model.layers.0.self_attn.k_proj.weight, model.norm.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.w_pack.weight" in message


def test_long_lists_of_tensors_are_cut(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_tensors(folder, dict.clear)
    with pytest.raises(CheckpointError, match=r"30 missing: .* and 22 more"):
        describe_native(folder)


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    edit_config(folder, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight \[288, 48\] instead of \[300, 48\]"):
        describe_native(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_tensor_of_a_dtype_that_is_not_read(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"of a dtype that is not read: {name}"):
        describe_native(folder)


def test_stored_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    folder = build_checkpoint("llama2", tmp_path)
    prompt = torch.arange(10)
    before = native_logits(folder, prompt)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    assert torch.equal(native_logits(folder, prompt), before)


def test_tied_output_matrix_that_is_stored_again(tmp_path: Path) -> None:
    folder = build_tied_checkpoint("llama3", tmp_path)
    prompt = torch.arange(10)
    before = native_logits(folder, prompt)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(native_logits(folder, prompt), before)


def test_tied_output_matrix_that_differs_from_the_embedding(tmp_path: Path) -> None:
    folder = build_tied_checkpoint("llama3", tmp_path)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert_load_fails(describe_native(folder), "is stored and differs")


def test_weights_that_do_not_fit_leave_nothing_allocated(tmp_path: Path) -> None:
    description = describe_native(build_checkpoint("llama3", tmp_path))
    allocator = HostAllocator(description.weight_bytes - 1)
    with pytest.raises(OutOfMemoryError):
        load_native(description, allocator)
    assert allocator.stats().allocated_bytes == 0


@pytest.mark.parametrize(("family", "dtype"), [("llama3", "float32"), ("gemma2", "bfloat16"), ("gpt_oss", "float16")])
def test_ledger_and_progress_tell_the_bytes_of_the_description(family: str, dtype: str, tmp_path: Path) -> None:
    description = describe_native(build_checkpoint(family, tmp_path), dtype=dtype)
    allocator, heard = HostAllocator(), []
    load_decoder(description, ReferenceOps(), allocator, "cpu", lambda done, total: heard.append((done, total)))
    assert allocator.stats().by_tag == (("weights", description.weight_bytes),)
    assert heard == sorted(heard)
    assert heard[-1] == (description.weight_bytes, description.weight_bytes)


def assert_load_fails(description: ModelDescription, match: str) -> None:
    allocator = HostAllocator()
    with pytest.raises(CheckpointError, match=match):
        load_decoder(description, ReferenceOps(), allocator, "cpu", ignore_progress)
    assert allocator.stats().allocated_bytes == 0
