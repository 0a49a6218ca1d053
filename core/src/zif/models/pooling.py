"""How a checkpoint makes one vector, or the logits of labels, of a text: what its files say.

An embedding model of sentence-transformers lists its steps in `modules.json`; one with a score head takes the last
token that is no padding, as transformers does; any other decoder gives its last token's hidden state, normalized. Reads
small files only and imports no array library. Weights are read by `zif.models.pooling_weights`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from zif.errors import ModelError
from zif.models.config import ConfigReader
from zif.models.heads import Head, split_architecture


class PoolingMode(StrEnum):
    """How the hidden states of n tokens become one vector.

    WEIGHTED_MEAN weighs token i by i + 1; MEAN_SQRT_LENGTH is the sum over the square root of n.
    """

    LAST = "last"
    FIRST = "first"
    MEAN = "mean"
    MAX = "max"
    MEAN_SQRT_LENGTH = "mean_sqrt_length"
    WEIGHTED_MEAN = "weighted_mean"


class Activation(StrEnum):
    """What follows a dense layer, or the logit of a score head with one label."""

    IDENTITY = "identity"
    TANH = "tanh"
    SIGMOID = "sigmoid"


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """A dense layer behind the pooling: its folder, numbers of channels, and what follows it."""

    folder: Path
    num_inputs: int
    num_outputs: int
    bias: bool
    activation: Activation


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """What a checkpoint makes of hidden states.

    Embeddings go through `dense` and are normalized to length 1 if `normalizes`. With `labels` there is a score head in
    their place; one logit becomes a score by `score_activation`. `pad_token_id` ends a text for a score head.
    `shorter_dimensions` are the only shorter lengths that embeddings may be cut to; empty: any.
    """

    mode: PoolingMode = PoolingMode.LAST
    dense: tuple[DenseSpec, ...] = ()
    normalizes: bool = True
    labels: tuple[str, ...] = ()
    score_activation: Activation = Activation.SIGMOID
    pad_token_id: int | None = None
    shorter_dimensions: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


_MODES: Mapping[str, PoolingMode] = MappingProxyType(
    {
        "lasttoken": PoolingMode.LAST,
        "cls": PoolingMode.FIRST,
        "mean": PoolingMode.MEAN,
        "max": PoolingMode.MAX,
        "mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LENGTH,
        "weightedmean": PoolingMode.WEIGHTED_MEAN,
    }
)
"""By the words of `pooling_mode`; the older flags are `pooling_mode_*`, and add "_tokens" or "_token" to some."""

_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "pooling_mode_lasttoken": "lasttoken",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
    }
)

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "torch.nn.modules.linear.Identity": Activation.IDENTITY,
        "torch.nn.modules.activation.Tanh": Activation.TANH,
        "torch.nn.modules.activation.Sigmoid": Activation.SIGMOID,
    }
)

MODULES_FILE = "modules.json"
"""Lists the steps of a model of sentence-transformers."""

_TEXTS = "sentence_bert_config.json"
_PROMPTS = "config_sentence_transformers.json"


def read_pooling(folder: Path, architecture: str, config: Mapping[str, Any], max_model_len: int) -> PoolingSpec:
    """Read how the checkpoint in `folder` pools texts of up to `max_model_len` tokens.

    Raises `ModelError` that names what is not implemented.
    """
    reader = ConfigReader(config, f"config.json ({architecture})")
    if split_architecture(architecture).head is Head.CLASSES:
        return PoolingSpec(
            labels=_labels(reader), score_activation=_score_activation(reader), pad_token_id=_pad_token_id(reader)
        )
    shorter = tuple(reader.entries("matryoshka_dimensions") or ())
    if not all(type(size) is int and size > 0 for size in shorter):
        raise reader.wrong("matryoshka_dimensions", "a list of positive integers")
    if not (folder / MODULES_FILE).is_file():
        return PoolingSpec(shorter_dimensions=shorter)
    return _of_modules(folder, shorter, max_model_len)


def _of_modules(folder: Path, shorter: tuple[int, ...], max_model_len: int) -> PoolingSpec:
    """Read the steps of a model of sentence-transformers: the decoder, pooling, dense layers, normalization."""
    modules = _read_json(folder / MODULES_FILE)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{MODULES_FILE} of {str(folder)!r} must hold a list of modules; download it again")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ModelError(
            f"{MODULES_FILE} of {str(folder)!r} lists the modules {', '.join(kinds)}; served are Transformer and "
            "Pooling, then Dense and Normalize"
        )
    if "Normalize" in kinds[:-1]:
        raise ModelError(f"{MODULES_FILE} of {str(folder)!r} normalizes before its end, which is not implemented")
    folders = [_module_folder(folder, module) for module in modules]
    dense = tuple(_dense(path) for path, kind in zip(folders, kinds, strict=True) if kind == "Dense")
    notes = (*_text_notes(folders[0], max_model_len), *_prompt_notes(folder))
    return PoolingSpec(_mode(folders[1]), dense, "Normalize" in kinds, shorter_dimensions=shorter, notes=notes)


def _module_folder(folder: Path, module: Mapping[str, Any]) -> Path:
    path = module.get("path")
    if not isinstance(path, str) or (path and (Path(path).name != path or path == "..")):
        raise ModelError(f"{MODULES_FILE} of {str(folder)!r} names {path!r}, which is no folder in it; correct it")
    return folder / path


def _mode(folder: Path) -> PoolingMode:
    reader = _config_of(folder)
    if not reader.flag("include_prompt", True):
        raise reader.wrong("include_prompt", "true: which tokens are a prompt's is not known here")
    chosen = [word for flag, word in _FLAGS.items() if reader.flag(flag, False)]
    chosen = chosen or [reader.text("pooling_mode", "mean")]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ModelError(
            f"{reader.owner}: pooling by {' and '.join(chosen)} is not implemented; one of {', '.join(_MODES)} is"
        )
    return _MODES[chosen[0]]


def _dense(folder: Path) -> DenseSpec:
    reader = _config_of(folder)
    activation = _activation(reader, "activation_function", Activation.TANH)
    sizes = reader.count("in_features"), reader.count("out_features")
    return DenseSpec(folder, *sizes, bias=reader.flag("bias", True), activation=activation)


def _config_of(folder: Path, name: str = "config.json") -> ConfigReader:
    path = folder / name
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ModelError(f"{str(path)!r} must hold an object; download it again")
    return ConfigReader(values, f"{folder.name}/{name}")


def _activation(reader: ConfigReader, key: str, default: Activation) -> Activation:
    name = reader.values.get(key)
    if name is None:
        return default
    if name not in _ACTIVATIONS:
        raise reader.wrong(key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _labels(reader: ConfigReader) -> tuple[str, ...]:
    """Return the names of the labels; transformers has two where the configuration does not say."""
    named = reader.values.get("id2label")
    if named is None:
        return tuple(f"LABEL_{index}" for index in range(reader.count("num_labels", 2)))
    if not isinstance(named, Mapping) or set(named) != {str(index) for index in range(len(named))}:
        raise reader.wrong("id2label", "an object with a name for each label from 0 on")
    return tuple(str(named[str(index)]) for index in range(len(named)))


def _score_activation(reader: ConfigReader) -> Activation:
    """Return what makes a score of one logit: what sentence-transformers has written, else the logistic function."""
    nested = reader.section("sentence_transformers")
    if nested is not None:
        return _activation(nested, "activation_fn", Activation.SIGMOID)
    return _activation(reader, "sbert_ce_default_activation_function", Activation.SIGMOID)


def _pad_token_id(reader: ConfigReader) -> int | None:
    value = reader.values.get("pad_token_id")
    if value is not None and type(value) is not int:
        raise reader.wrong("pad_token_id", "a token id")
    return value


def _text_notes(folder: Path, max_model_len: int) -> tuple[str, ...]:
    """Read what sentence-transformers does to texts before they are encoded, of which zif does nothing.

    Raises `ModelError` for what changes every vector; says that texts are not cut where they would be.
    """
    if not (folder / _TEXTS).is_file():
        return ()
    reader = _config_of(folder, _TEXTS)
    if reader.flag("do_lower_case", False):
        raise ModelError(
            f"{reader.owner}: do_lower_case=true is not implemented; send texts in lower case and set it to false"
        )
    longest = reader.optional_count("max_seq_length")
    if longest is None or longest >= max_model_len:
        return ()
    return (
        f"{_TEXTS} cuts texts after {longest} tokens; zif embeds texts of up to {max_model_len} whole: "
        f"max_model_len={longest} refuses longer ones",
    )


def _prompt_notes(folder: Path) -> tuple[str, ...]:
    """Say that texts are embedded as they come where sentence-transformers would put a prompt before them."""
    path = folder / _PROMPTS
    values = _read_json(path) if path.is_file() else {}
    name = values.get("default_prompt_name") if isinstance(values, dict) else None
    if not name:
        return ()
    return (f"{_PROMPTS} puts the prompt {name!r} before every text; zif embeds texts as they are sent: send it, too",)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error}; download it again") from error
