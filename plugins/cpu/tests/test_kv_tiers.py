"""KV that leaves the device and comes back, on real arrays: no copy changes a token, in any kind of layer."""

import functools
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from support.greedy_parity import prompts, settings
from zif import LLM, SamplingParams
from zif.contract import BlockSave, StepFuture, StepPlan
from zif.engine.planning import plan_model
from zif.errors import PlanRefusedError
from zif.runtime.runner import TorchRunner

FAMILIES = ("llama3", "gemma2", "gpt_oss", "qwen3_next", "granite_hybrid")
SAMPLING = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, detokenize=False)
LIMITS: dict[str, object] = {"block_size": 8, "max_num_batched_tokens": 32, "expected_output_percent": 0}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@functools.cache
def checkpoint(family: str, root: Path) -> Path:
    return build_checkpoint(family, root / family)


@functools.cache
def little_kv_bytes(model: Path) -> int:
    """Return about the least KV memory that is accepted: one request fits."""
    num_bytes = 1024
    while True:
        try:
            plan_model(settings(model, kv_bytes=num_bytes, **LIMITS))
        except PlanRefusedError:
            num_bytes += num_bytes // 8
        else:
            return num_bytes


@functools.cache
def unhurried(family: str, root: Path) -> list[list[int]]:
    """Return what each prompt gives with more memory than it needs."""
    with LLM.from_settings(settings(checkpoint(family, root), kv_bytes=1 << 24, **LIMITS)) as llm:
        return answers(llm)


def answers(llm: LLM) -> list[list[int]]:
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts()]
    outputs = llm.generate(given, SAMPLING, use_tqdm=False)
    llm.engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


class NotedPlans:
    """The saves and loads that the runner was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.saves: list[BlockSave] = []
        self.num_loads = 0
        submit = TorchRunner.submit

        def noted(runner: TorchRunner, step: StepPlan) -> StepFuture:
            if step.transfers is not None:
                self.saves += step.transfers.saves
                self.num_loads += len(step.transfers.loads)
            return submit(runner, step)

        monkeypatch.setattr(TorchRunner, "submit", noted)


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_prefixes_come_back_from_host_memory(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, noted = checkpoint(family, root), NotedPlans(monkeypatch)
    tiers = {"kv_bytes": little_kv_bytes(model), "host_kv_bytes": 1 << 24, **LIMITS}
    with LLM.from_settings(settings(model, **tiers)) as llm:
        assert answers(llm) == unhurried(family, root)
        assert answers(llm) == unhurried(family, root)
        again = [llm.generate({"prompt_token_ids": list(p)}, SAMPLING, use_tqdm=False)[0] for p in prompts()]
        assert sum(output.cached_tokens_by_tier.get("host", 0) for output in again) > 0
    assert any(save.name for save in noted.saves)
    assert noted.num_loads


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_requests_go_on_with_the_same_tokens(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, noted = checkpoint(family, root), NotedPlans(monkeypatch)
    tiers = {"kv_bytes": little_kv_bytes(model), "host_kv_bytes": 1 << 24, "enable_prefix_caching": False, **LIMITS}
    with LLM.from_settings(settings(model, **tiers)) as llm:
        assert answers(llm) == unhurried(family, root)
    assert noted.saves
    assert not any(save.name for save in noted.saves)
    assert noted.num_loads == len(noted.saves)


def test_a_restart_finds_prefixes_on_disk(root: Path, tmp_path: Path) -> None:
    model = checkpoint("llama3", root)
    tiers = {"kv_bytes": little_kv_bytes(model), "disk_kv_bytes": 1 << 24, "disk_kv_path": str(tmp_path), **LIMITS}
    with LLM.from_settings(settings(model, **tiers)) as llm:
        assert answers(llm) == unhurried("llama3", root)
    with LLM.from_settings(settings(model, **tiers)) as llm:
        output = llm.generate({"prompt_token_ids": list(prompts()[4])}, SAMPLING, use_tqdm=False)[0]
        assert output.cached_tokens_by_tier["disk"] == output.num_cached_tokens > 0
        assert output.outputs[0].token_ids == unhurried("llama3", root)[4]
