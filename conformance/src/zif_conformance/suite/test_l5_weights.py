"""L5, weights: what a quantized checkpoint says is what the model computes with; a spoilt one is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zif import LLM
from zif.contract import Feature
from zif.errors import ModelError
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import FAMILIES
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens
from zif_conformance.tiny_models.packed import PackedCheckpoint, write_packed
from zif_conformance.tiny_models.truth import Truth

_CLAIMS = (Feature.QUANTIZATION_MXFP4_DEQUANTIZED, *FAMILIES["sinks"].features)
_SCALES = "model.layers.0.mlp.experts.down_proj_scales"


@pytest.fixture
def checkpoint(tiny: TinyModels, tmp_path: Path) -> PackedCheckpoint:
    """A model whose experts are packed."""
    return write_packed(tmp_path, tiny.capabilities)


@conforms(level="L5", gate="G7", clause=("4.2", "10.2"), claims=_CLAIMS)
def test_packed_experts_are_the_numbers_they_stand_for(
    tiny: TinyModels, record_gate: GateRecorder, checkpoint: PackedCheckpoint
) -> None:
    with LLM(**tiny.settings(checkpoint.packed)) as opened:
        outputs = answer(opened, [prompt_tokens(30), prompt_tokens(9, 1)], greedy(16))
    hold_answers(Truth.of(checkpoint.plain, tiny.dtype), record_gate, outputs, 16)


@conforms(level="L5", clause="4.2", claims=_CLAIMS, negative=True)
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda tensors: tensors.pop(_SCALES), id="missing"),
        pytest.param(lambda tensors: tensors.update({_SCALES: tensors[_SCALES][:, 1:].contiguous()}), id="shape"),
        pytest.param(lambda tensors: tensors.update({_SCALES: tensors[_SCALES].float()}), id="dtype"),
        pytest.param(lambda tensors: tensors[_SCALES][0, 0].fill_(255), id="not-a-number"),
    ],
)
def test_spoilt_scales_are_refused(
    tiny: TinyModels, checkpoint: PackedCheckpoint, spoil: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint.tensors)
    spoil(tensors)
    save_file(tensors, checkpoint.tensors, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="down_proj"):
        LLM(**tiny.settings(checkpoint.packed))
