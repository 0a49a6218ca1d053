"""Planning: what is refused before anything loads, and what is fitted."""

from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from zif.engine.planning import plan_model
from zif.errors import ConfigError, PlanRefusedError, PlatformNotFoundError
from zif.settings import EngineSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("gemma2", tmp_path_factory.mktemp("model"))


def settings(model: Path, **values: object) -> EngineSettings:
    return EngineSettings.from_values({"model": str(model), "platform": "null", **values})


def test_context_is_fitted_to_memory_and_said(model: Path) -> None:
    planned = plan_model(settings(model, kv_bytes=4000, max_num_batched_tokens=16, max_num_seqs=1))
    assert 64 <= planned.config.max_model_len < 512
    assert str(planned.config.max_model_len) in planned.notes[0]
    assert planned.model.max_model_len == planned.config.max_model_len


def test_context_that_was_asked_for_is_not_shortened(model: Path) -> None:
    with pytest.raises(PlanRefusedError, match=r"max_model_len=512.*tokens would fit"):
        plan_model(settings(model, kv_bytes=4000, max_num_batched_tokens=16, max_model_len=512))


def test_too_little_memory_is_refused_with_bytes_of_each_kind(model: Path) -> None:
    with pytest.raises(PlanRefusedError, match=r"weights .* bytes\).*KV blocks .*activations .*available"):
        plan_model(settings(model, memory_limit=100_000))


def test_context_beyond_the_model_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"513.*512"):
        plan_model(settings(model, max_model_len=513))


def test_absent_platform_names_the_command_that_adds_it(model: Path) -> None:
    with pytest.raises(PlatformNotFoundError, match="pip install zif-warp"):
        plan_model(settings(model, platform="warp"))


def test_arena_holds_one_request_of_full_length(model: Path) -> None:
    planned = plan_model(settings(model))
    assert planned.arena.num_bytes <= planned.plan.memory.kv_bytes
    assert planned.config.max_model_len == 512


def test_a_kv_dtype_that_the_platform_does_not_offer_is_refused_by_name(model: Path) -> None:
    with pytest.raises(PlanRefusedError, match=r"KV dtype 'int8' is not offered; choose one of: .*float32"):
        plan_model(settings(model, kv_cache_dtype="int8"))


def test_the_kv_dtype_asked_for_is_that_of_all_groups(model: Path) -> None:
    planned = plan_model(settings(model, kv_cache_dtype="float16"))
    assert planned.model.dtype == "float32"
    assert {group.spec.dtype for group in planned.arena.groups} == {"float16"}
    assert len(planned.arena.groups) == 2
