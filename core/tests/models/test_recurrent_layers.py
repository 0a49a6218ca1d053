"""Recurrent layers through the transformers backend: described by name, kept apart by request, resumed at any token.

Parity is teacher-forced: requests share every step, and transformers sees each of them alone and whole.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import HYBRIDS, build_checkpoint
from support.history_attention import HistoryAttention
from support.host_memory import HostAllocator
from support.native_models import ignore_progress, transformers_logits
from support.request_states import RequestStates
from zif.contract import Feature, FullAttentionSpec, ModelDescription, RecurrentStateSpec, StateTensor
from zif.errors import ConfigError, UnknownArchitectureError
from zif.models.description import ModelSource
from zif.models.transformers_backend import describe, load_transformers_model
from zif.models.transformers_model import TransformersModel

TOLERANCE = 2e-4
KERNEL = 4
MAMBA2_STATE = (
    StateTensor("conv", (160, KERNEL), "float32"),
    StateTensor("recurrent", (4, 24, 16), "float32"),
)

# Tokens that each of two requests adds, step by step: 1, 2, kernel - 1, kernel, and more, first and with a state.
STEPS = {
    "one by one": [[1, 1]] * 6,
    "one and two": [[1, 2], [2, 1], [1, 2], [2, 1]],
    "around the kernel": [[KERNEL - 1, KERNEL], [KERNEL, KERNEL - 1], [KERNEL - 1, KERNEL], [KERNEL, KERNEL - 1]],
    "beyond the kernel": [[KERNEL + 1, 9], [9, KERNEL + 1], [1, 11], [11, 1]],
    "long": [[17, 3], [3, 17]],
}


@functools.cache
def folder_of(family: str, root: Path) -> Path:
    return build_checkpoint(family, root / family)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recurrent")


def describe_folder(folder: Path, dtype: str = "float32", kv_dtype: str = "auto") -> ModelDescription:
    source = ModelSource(folder, dtype=dtype, implementation="transformers", max_model_len=64, kv_dtype=kv_dtype)
    return describe(source, json.loads((folder / "config.json").read_text()))


def load(folder: Path) -> TransformersModel:
    model = load_transformers_model(describe_folder(folder), HostAllocator(), "cpu", ignore_progress)
    assert isinstance(model, TransformersModel)
    return model


def run_steps(model: TransformersModel, requests: list[torch.Tensor], steps: list[list[int]]) -> list[torch.Tensor]:
    """Return each request's logits [T, V] when the steps are cut as `steps` says."""
    attention, states = HistoryAttention(), RequestStates()
    done, logits = [0] * len(requests), [[] for _ in requests]
    for chunks in steps:
        attention.chunks = chunks
        states.begin_step(chunks)
        ids = [r[d : d + c] for r, d, c in zip(requests, done, chunks, strict=True)]
        positions = [torch.arange(d, d + c) for d, c in zip(done, chunks, strict=True)]
        hidden = model.forward(torch.cat(ids), torch.cat(positions), attention, states)
        for rows, request in zip(hidden.split(chunks), logits, strict=True):
            request.append(model.logits(rows))
        done = [d + c for d, c in zip(done, chunks, strict=True)]
    return [torch.cat(rows) for rows in logits]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", HYBRIDS)
def test_two_packed_requests_give_the_logits_of_each_alone(family: str, steps: str, root: Path) -> None:
    folder, generator = folder_of(family, root), torch.Generator().manual_seed(1)
    lengths = torch.tensor(STEPS[steps]).sum(0).tolist()
    requests = [torch.randint(5, 120, (n,), generator=generator) for n in lengths]
    for request, logits in zip(requests, run_steps(load(folder), requests, STEPS[steps]), strict=True):
        theirs = transformers_logits(folder, request)
        assert theirs.std() > 0.05, "flat logits would hide differences"
        torch.testing.assert_close(logits, theirs, rtol=0, atol=TOLERANCE)


def test_describes_states_beside_attention(root: Path) -> None:
    description = describe_folder(folder_of("granite_hybrid", root))
    assert description.kv_specs == (
        FullAttentionSpec((1, 3), 2, 12, 16, "float32"),
        RecurrentStateSpec((0, 2), MAMBA2_STATE, 16, "float32"),
    )
    assert description.features == {
        Feature.ATTENTION_FULL,
        Feature.STATE_RECURRENT,
        Feature.TRANSFORMERS_BACKEND,
    }


def test_a_layer_may_attend_and_carry_a_state(root: Path) -> None:
    attention, state = describe_folder(folder_of("falcon_h1", root)).kv_specs
    assert attention.layers == state.layers == (0, 1, 2)


def test_a_model_may_have_no_attention_at_all(root: Path) -> None:
    description = describe_folder(folder_of("mamba2", root))
    assert description.kv_specs == (RecurrentStateSpec((0, 1, 2), MAMBA2_STATE, 16, "float32"),)


def test_states_keep_their_dtypes_beside_kv_of_another(root: Path) -> None:
    plain = describe_folder(folder_of("granite_hybrid", root)).kv_specs
    attention, state = describe_folder(folder_of("granite_hybrid", root), kv_dtype="int8").kv_specs
    assert attention == replace(plain[0], dtype="int8")
    assert state == plain[1]


def test_a_kv_dtype_for_a_model_without_keys_and_values_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='int8' has no meaning for 'Mamba2ForCausalLM'"):
        describe_folder(folder_of("mamba2", root), kv_dtype="int8")


def test_each_tensor_of_a_state_keeps_the_dtype_that_the_model_uses(root: Path) -> None:
    spec = describe_folder(folder_of("qwen3_next", root), dtype="bfloat16").kv_specs[1]
    assert isinstance(spec, RecurrentStateSpec)
    assert {tensor.name: tensor.dtype for tensor in spec.tensors} == {"conv": "bfloat16", "recurrent": "float32"}


def patch_mixer(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change(result, original, hidden_states)` make the output of a convolution layer."""
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    original = Lfm2ShortConv.forward

    def forward(self: Any, hidden_states: Any, past_key_values: Any = None, **options: Any) -> Any:
        return change(functools.partial(original, self, **options), hidden_states, past_key_values)

    monkeypatch.setattr(Lfm2ShortConv, "forward", forward)


def test_refuses_a_mixer_that_ignores_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_mixer(monkeypatch, lambda run, hidden, _cache: run(hidden))
    with pytest.raises(UnknownArchitectureError, match="Lfm2ShortConv of layer 0 does not keep its state"):
        describe_folder(folder_of("lfm2", root))


def test_refuses_a_mixer_that_asks_for_more_than_states(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_mixer(monkeypatch, lambda run, hidden, cache: run(hidden, cache) * cache.get_seq_length())
    with pytest.raises(UnknownArchitectureError, match=r"cannot be followed without weights.*get_seq_length"):
        describe_folder(folder_of("lfm2", root))


def test_refuses_a_mixer_in_which_requests_meet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_mixer(monkeypatch, lambda run, hidden, cache: run(hidden, cache) + hidden.mean(0, keepdim=True))
    with pytest.raises(UnknownArchitectureError, match="outside attention"):
        load(folder_of("lfm2", root))


def test_a_mixer_that_forgets_its_state_in_long_steps_is_run_token_by_token(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, generator = folder_of("lfm2", root), torch.Generator().manual_seed(1)
    request = torch.randint(5, 120, (12,), generator=generator)
    expected = transformers_logits(folder, request)

    def forget(run: Any, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
        if cache is not None and cache.has_previous_state() and hidden.shape[1] > 1:
            cache.tensors["conv"] = torch.zeros_like(cache.tensors["conv"])
        return run(hidden, cache)  # type: ignore[no-any-return]

    patch_mixer(monkeypatch, forget)
    logits = run_steps(load(folder), [request], [[5], [7]])[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
