"""A safetensors checkpoint on disk: which tensors there are, and where their bytes lie.

Reads headers only and imports no array library; `zif.models.weights` reads the bytes. Used by description and loading.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from zif.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DECODER_PREFIX = "model."

_BARE_EMBEDDING = "embed_tokens.weight"
_HEADS = ("lm_head.", "score.")

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "U8": "uint8",
        "I8": "int8",
        "I32": "int32",
        "I64": "int64",
    }
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    `dtype` is torch's name where the loader reads it, else the format's own ("F8_E4M3"). `offset` is in bytes from the
    start of `file`.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder, by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a model folder. Raises `CheckpointError`, naming the file, when they are not all sound."""
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in {str(tensors[tensor.name].file)!r} and in {str(file)!r}; "
                    f"remove the file that does not belong to the checkpoint"
                )
            tensors[tensor.name] = tensor
    _check_index(folder, tensors)
    return Checkpoint(folder, MappingProxyType(tensors))


def open_decoder_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers as `open_checkpoint` does; every tensor of the decoder has a name that begins with "model.".

    A decoder that was saved without a head, as embedding models are, has its tensors without that prefix.
    """
    checkpoint = open_checkpoint(folder)
    if _BARE_EMBEDDING not in checkpoint.tensors:
        return checkpoint
    named = {
        name if name.startswith(_HEADS) else f"{DECODER_PREFIX}{name}": tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return Checkpoint(folder, MappingProxyType(named))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_explain_absence(folder))
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{str(folder / INDEX_FILE)!r} names the shard {file.name!r}, which is missing; download it again"
            )
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is no index of shards ({error!r}); download it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"weight_map in {str(path)!r} must map tensor names to file names; download it again")
    for name in weight_map.values():
        if Path(name).name != name:
            raise CheckpointError(f"{str(path)!r} names {name!r}, which is not a file of the same folder; correct it")
    return weight_map


def _explain_absence(folder: Path) -> str:
    if not folder.is_dir():
        return f"model folder {str(folder)!r} does not exist; give a folder that holds safetensors files"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        return (
            f"{str(folder)!r} holds pickled weights only (.bin, .pt or .pth), which are not loaded because reading "
            "them runs code; convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        return f"{str(folder)!r} holds {shards[0]!r} but no {INDEX_FILE}; download the index that belongs to the shards"
    return f"no {SINGLE_FILE} and no {INDEX_FILE} in {str(folder)!r}; download the weights of the model"


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise when the index promises a tensor that its shard does not hold."""
    if (folder / SINGLE_FILE).is_file():
        return
    for name, file in _weight_map(folder).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{str(folder / INDEX_FILE)!r} says that tensor {name!r} is in {file!r}, which does not hold it; "
                "download the shard again"
            )


def _read_header(file: Path) -> list[StoredTensor]:
    """Let the library validate the file, then read offsets, which it does not tell.

    Format: 8 bytes length, little endian, then that many bytes of JSON, then data.
    https://github.com/huggingface/safetensors#format
    """
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a sound safetensors file ({error}): truncated or corrupt; download it again"
        ) from error
    header.pop("__metadata__", None)
    return [_stored_tensor(file, name, entry, 8 + length) for name, entry in header.items()]


def _stored_tensor(file: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    return StoredTensor(name, file, _DTYPES.get(dtype, dtype), shape, data_start + start, end - start)
