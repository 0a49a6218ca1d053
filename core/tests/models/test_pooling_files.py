"""What the small files of a checkpoint say of pooling, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zif.errors import CheckpointError, ModelError
from zif.models.heads import Head, HeadedArchitecture, bare_architecture, split_architecture
from zif.models.pooling import Activation, DenseSpec, PoolingMode, PoolingSpec, read_pooling
from zif.models.pooling_weights import load_pooling

EMBEDS = "Qwen3ForCausalLM"
CLASSIFIES = "Qwen3ForSequenceClassification"
LENGTH = 512


def write(folder: Path, kinds: list[str], pooling: dict[str, Any], **dense: Any) -> Path:
    paths = [f"{index}_{kind}" if index else "" for index, kind in enumerate(kinds)]
    modules = [{"path": p, "type": f"sentence_transformers.models.{k}"} for p, k in zip(paths, kinds, strict=True)]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path, kind in zip(paths, kinds, strict=True):
        if path:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(pooling if kind == "Pooling" else dense))
    return folder


@pytest.mark.parametrize(
    ("name", "family", "head"),
    [
        ("Qwen3ForCausalLM", "Qwen3ForCausalLM", Head.TOKENS),
        ("Qwen3Model", "Qwen3ForCausalLM", Head.NONE),
        ("Gemma3TextModel", "Gemma3ForCausalLM", Head.NONE),
        ("LlamaForSequenceClassification", "LlamaForCausalLM", Head.CLASSES),
        ("Gemma3TextForSequenceClassification", "Gemma3ForCausalLM", Head.CLASSES),
        ("GPT2LMHeadModel", "GPT2LMHeadModel", Head.TOKENS),
    ],
)
def test_an_architecture_is_a_family_and_a_head(name: str, family: str, head: Head) -> None:
    assert split_architecture(name) == HeadedArchitecture(family, head)
    if family.endswith("ForCausalLM"):
        assert split_architecture(bare_architecture(name)) == HeadedArchitecture(family, Head.NONE)


def test_without_files_it_is_the_last_token_normalized(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, EMBEDS, {}, LENGTH) == PoolingSpec(mode=PoolingMode.LAST, normalizes=True)
    assert read_pooling(tmp_path, EMBEDS, {"matryoshka_dimensions": [64, 128]}, LENGTH).shorter_dimensions == (64, 128)


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, PoolingMode.LAST),
        ({"pooling_mode_cls_token": True}, PoolingMode.FIRST),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, PoolingMode.LAST),
        ({"pooling_mode": "weightedmean"}, PoolingMode.WEIGHTED_MEAN),
        ({}, PoolingMode.MEAN),
    ],
)
def test_modules_say_how(pooling: dict[str, Any], mode: PoolingMode, tmp_path: Path) -> None:
    plain = read_pooling(write(tmp_path, ["Transformer", "Pooling"], pooling), EMBEDS, {}, LENGTH)
    assert (plain.mode, plain.normalizes, plain.dense) == (mode, False, ())


def test_dense_layers_and_normalization_are_read(tmp_path: Path) -> None:
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    spec = read_pooling(write(tmp_path, kinds, {}, in_features=8, out_features=4, bias=False), EMBEDS, {}, LENGTH)
    (dense,) = spec.dense
    assert (dense.num_inputs, dense.num_outputs, dense.bias) == (8, 4, False)
    assert (dense.activation, dense.folder.name, spec.normalizes) == (Activation.TANH, "2_Dense", True)


@pytest.mark.parametrize(
    ("kinds", "pooling", "reason"),
    [
        (["Transformer", "Pooling", "LayerNorm"], {}, "LayerNorm"),
        (["Transformer", "Pooling", "Normalize", "Dense"], {}, "normalizes before its end"),
        (["WordEmbeddings", "Pooling"], {}, "WordEmbeddings"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls and max"),
        (["Transformer", "Pooling"], {"pooling_mode": "attention"}, "attention"),
        (["Transformer", "Pooling"], {"include_prompt": False}, "include_prompt"),
        (["Transformer", "Pooling", "Dense"], {}, "in_features"),
    ],
)
def test_what_is_not_implemented_is_named(
    kinds: list[str], pooling: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        read_pooling(write(tmp_path, kinds, pooling), EMBEDS, {}, LENGTH)


@pytest.mark.parametrize("path", ["..", "../other", "/etc", "a/b", 5])
def test_modules_outside_of_the_folder_are_refused(path: object, tmp_path: Path) -> None:
    write(tmp_path, ["Transformer", "Pooling"], {})
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["path"] = path
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="no folder in it"):
        read_pooling(tmp_path, EMBEDS, {}, LENGTH)


def test_a_default_prompt_is_told_and_not_added(tmp_path: Path) -> None:
    write(tmp_path, ["Transformer", "Pooling"], {})
    assert read_pooling(tmp_path, EMBEDS, {}, LENGTH).notes == ()
    (tmp_path / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    assert "'query'" in read_pooling(tmp_path, EMBEDS, {}, LENGTH).notes[0]


def test_lower_case_is_refused_and_a_length_at_which_texts_would_be_cut_is_told(tmp_path: Path) -> None:
    write(tmp_path, ["Transformer", "Pooling"], {})
    texts = tmp_path / "sentence_bert_config.json"
    for length, is_told in ((None, False), (LENGTH, False), (LENGTH - 1, True)):
        texts.write_text(json.dumps({"max_seq_length": length, "do_lower_case": False}))
        notes = read_pooling(tmp_path, EMBEDS, {}, LENGTH).notes
        assert [f"max_model_len={length} refuses" in note for note in notes] == [True] * is_told
    texts.write_text('{"do_lower_case": true}')
    with pytest.raises(ModelError, match="do_lower_case=true is not implemented"):
        read_pooling(tmp_path, EMBEDS, {}, LENGTH)


def dense(folder: Path, num_inputs: int, num_outputs: int) -> DenseSpec:
    folder.mkdir()
    save_file({"linear.weight": torch.ones(num_outputs, num_inputs)}, folder / "model.safetensors")
    return DenseSpec(folder, num_inputs, num_outputs, bias=False, activation=Activation.IDENTITY)


def test_layers_that_do_not_fit_what_comes_before_them_are_refused(tmp_path: Path) -> None:
    layers = dense(tmp_path / "first", 8, 4), dense(tmp_path / "second", 4, 2), dense(tmp_path / "third", 8, 2)
    for hidden_size in (8, None):
        fitting = load_pooling(tmp_path, PoolingSpec(dense=layers[:2]), hidden_size)
        assert [layer.weight.shape for layer in fitting.dense] == [(4, 8), (2, 4)]
    with pytest.raises(CheckpointError, match=r"first' takes 8 channels, and what comes before it gives 6"):
        load_pooling(tmp_path, PoolingSpec(dense=layers[:2]), 6)
    with pytest.raises(CheckpointError, match=r"third' takes 8 channels, and what comes before it gives 4"):
        load_pooling(tmp_path, PoolingSpec(dense=(layers[0], layers[2])), 8)


def test_a_score_head_that_does_not_fit_the_hidden_states_is_refused(tmp_path: Path) -> None:
    save_file({"score.weight": torch.ones(1, 6)}, tmp_path / "model.safetensors")
    assert load_pooling(tmp_path, PoolingSpec(labels=("relevant",)), 6).score is not None
    with pytest.raises(CheckpointError, match=r"'score\.weight' .* takes 6 channels, .* gives 8"):
        load_pooling(tmp_path, PoolingSpec(labels=("relevant",)), 8)


def test_labels_padding_and_activation_of_a_score_head(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, CLASSIFIES, {}, LENGTH).labels == ("LABEL_0", "LABEL_1")
    config = {"id2label": {"0": "yes"}, "pad_token_id": 3}
    spec = read_pooling(tmp_path, CLASSIFIES, config, LENGTH)
    assert (spec.labels, spec.pad_token_id, spec.score_activation) == (("yes",), 3, Activation.SIGMOID)
    named = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    assert read_pooling(tmp_path, CLASSIFIES, named, LENGTH).score_activation is Activation.IDENTITY
    for wrong in ({"id2label": {"1": "x"}}, {"pad_token_id": "x"}, {"sbert_ce_default_activation_function": "my.Own"}):
        with pytest.raises(ModelError, match="must be"):
            read_pooling(tmp_path, CLASSIFIES, wrong, LENGTH)
