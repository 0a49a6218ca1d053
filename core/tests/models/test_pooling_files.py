"""What the small files of a checkpoint say of pooling, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from zif.errors import ModelError
from zif.models.heads import Head, HeadedArchitecture, split_architecture
from zif.models.pooling import Activation, PoolingMode, PoolingSpec, read_pooling

EMBEDS = "Qwen3ForCausalLM"
CLASSIFIES = "Qwen3ForSequenceClassification"


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


def test_without_files_it_is_the_last_token_normalized(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, EMBEDS, {}) == PoolingSpec(mode=PoolingMode.LAST, normalizes=True)
    assert read_pooling(tmp_path, EMBEDS, {"matryoshka_dimensions": [64, 128]}).shorter_dimensions == (64, 128)


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
    plain = read_pooling(write(tmp_path, ["Transformer", "Pooling"], pooling), EMBEDS, {})
    assert (plain.mode, plain.normalizes, plain.dense) == (mode, False, ())


def test_dense_layers_and_normalization_are_read(tmp_path: Path) -> None:
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    spec = read_pooling(write(tmp_path, kinds, {}, in_features=8, out_features=4, bias=False), EMBEDS, {})
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
        read_pooling(write(tmp_path, kinds, pooling), EMBEDS, {})


@pytest.mark.parametrize("path", ["..", "../other", "/etc", "a/b", 5])
def test_modules_outside_of_the_folder_are_refused(path: object, tmp_path: Path) -> None:
    write(tmp_path, ["Transformer", "Pooling"], {})
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["path"] = path
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="no folder in it"):
        read_pooling(tmp_path, EMBEDS, {})


def test_a_default_prompt_is_told_and_not_added(tmp_path: Path) -> None:
    write(tmp_path, ["Transformer", "Pooling"], {})
    assert read_pooling(tmp_path, EMBEDS, {}).notes == ()
    (tmp_path / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    assert "'query'" in read_pooling(tmp_path, EMBEDS, {}).notes[0]


def test_labels_padding_and_activation_of_a_score_head(tmp_path: Path) -> None:
    assert read_pooling(tmp_path, CLASSIFIES, {}).labels == ("LABEL_0", "LABEL_1")
    config = {"id2label": {"0": "yes"}, "pad_token_id": 3}
    spec = read_pooling(tmp_path, CLASSIFIES, config)
    assert (spec.labels, spec.pad_token_id, spec.score_activation) == (("yes",), 3, Activation.SIGMOID)
    named = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    assert read_pooling(tmp_path, CLASSIFIES, named).score_activation is Activation.IDENTITY
    for wrong in ({"id2label": {"1": "x"}}, {"pad_token_id": "x"}, {"sbert_ce_default_activation_function": "my.Own"}):
        with pytest.raises(ModelError, match="must be"):
            read_pooling(tmp_path, CLASSIFIES, wrong)
