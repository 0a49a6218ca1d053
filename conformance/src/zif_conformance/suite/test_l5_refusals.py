"""L5, refusals: what a platform cannot run is refused before weights load; broken weights leave nothing."""

from pathlib import Path
from typing import Any

import pytest

from zif import LLM
from zif.contract import Capabilities, Feature
from zif.errors import ModelError, PlanRefusedError, ZifError
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import break_weights, write_checkpoint
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens

_FULL = (Feature.ATTENTION_FULL,)


@conforms(level="L5", clause=("4.3", "4.4"), claims=_FULL, negative=True)
@pytest.mark.parametrize("kv_bytes", [1, 64, 4096])
def test_too_little_kv_memory_is_refused(tiny: TinyModels, kv_bytes: int) -> None:
    with pytest.raises(PlanRefusedError, match=r"kv_bytes=.*[0-9]+ bytes"):
        tiny.open("dense", kv_bytes=kv_bytes)


@conforms(level="L5", clause="4.3", claims=_FULL, negative=True)
@pytest.mark.parametrize("memory_limit", [1, 4096, 65536])
def test_too_little_memory_is_refused(tiny: TinyModels, memory_limit: int) -> None:
    with pytest.raises(PlanRefusedError, match=r"[0-9]+ bytes"):
        tiny.open("dense", memory_limit=memory_limit, kv_bytes=None)


@conforms(level="L5", clause=("3.4", "4.2"), claims=_FULL, negative=True)
def test_a_block_size_that_is_not_claimed_is_refused(tiny: TinyModels) -> None:
    foreign = next(size for size in range(3, 99) if size not in tiny.capabilities.block_sizes)
    with pytest.raises(PlanRefusedError, match=str(foreign)):
        tiny.open("dense", block_size=foreign)


@conforms(level="L5", clause=("3.4", "4.2"), claims=_FULL, negative=True)
def test_a_head_size_that_is_not_claimed_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    foreign = _foreign_head_size(tiny.capabilities)
    folder = write_checkpoint("dense", tmp_path, tiny.capabilities, head_dim=foreign)
    break_weights(folder)
    with pytest.raises(PlanRefusedError, match=str(foreign)):
        LLM(**tiny.settings(folder))


@conforms(level="L5", clause=("4.1", "4.2"), claims=_FULL, negative=True)
@pytest.mark.parametrize(
    "changes",
    [{"max_model_len": 2**30}, {"tensor_parallel_size": 4096}],
    ids=["context", "more ranks than devices"],
)
def test_a_workload_that_cannot_be_is_refused(tiny: TinyModels, changes: dict[str, Any]) -> None:
    with pytest.raises(ZifError):
        tiny.open("dense", **changes)


@conforms(level="L5", gate="G7", clause=("6.2", "6.4"), claims=_FULL, negative=True, deadline_s=120.0)
@pytest.mark.parametrize("damage", ["cut", "tensor missing", "wrong shape"])
def test_after_broken_weights_the_device_can_be_opened_again(
    tiny: TinyModels, record_gate: GateRecorder, tmp_path: Path, damage: str
) -> None:
    folder = write_checkpoint("dense", tmp_path, tiny.capabilities)
    _damage(folder / "model.safetensors", damage)
    for _ in range(3):
        with pytest.raises(ModelError):
            LLM(**tiny.settings(folder))
    with tiny.open("dense") as opened:
        outputs = answer(opened, [prompt_tokens(21, 30)], greedy(5))
    hold_answers(tiny.truth("dense"), record_gate, outputs, 5)


def _foreign_head_size(capabilities: Capabilities) -> int:
    """Return an even head size that is not claimed."""
    return next(size for size in range(2, 1 << 20, 2) if not capabilities.accepts_head_size(size))


def _damage(path: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    if how == "cut":
        path.write_bytes(path.read_bytes()[:-64])
        return
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    if how == "tensor missing":
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
