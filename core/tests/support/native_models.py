"""Load native decoders and ask them for logits, without engine or platform."""

from pathlib import Path

import torch

from support.dense_attention import DenseAttention
from support.host_memory import HostAllocator
from zif.contract import ModelDescription
from zif.models.description import ModelSource, describe_model
from zif.models.model import Model
from zif.models.weights import load_decoder
from zif.reference.ops import ReferenceOps


def ignore_progress(done: int, total: int) -> None:
    """Be a `Progress` that does nothing."""


def load_native(description: ModelDescription, allocator: HostAllocator | None = None) -> Model:
    """Load a described model into host memory."""
    return load_decoder(description, ReferenceOps(), allocator or HostAllocator(), "cpu", ignore_progress)


def describe_native(folder: Path, dtype: str = "auto", max_model_len: int | None = None) -> ModelDescription:
    """Describe the model in `folder` for the native decoder."""
    return describe_model(ModelSource(folder, dtype=dtype, max_model_len=max_model_len, implementation="native"))


def native_logits(folder: Path, token_ids: torch.Tensor, **options: str | int | None) -> torch.Tensor:
    """Return the logits at every position of one sequence, [T, V]."""
    model = load_native(describe_native(folder, **options))
    with torch.inference_mode():
        positions = torch.arange(token_ids.shape[0])
        return model.logits(model.forward(token_ids, positions, DenseAttention()))


def transformers_logits(folder: Path, token_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return what transformers computes for the same, [T, V]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(token_ids[None]).logits[0].float()
