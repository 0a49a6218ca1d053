"""Tiers of KV through the public interface, on the null platform: every token is known in advance."""

import os
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from support.tiers import FlakyRemote
from zif import LLM, SamplingParams
from zif.contract import ModelRunner, StepFuture, StepPlan
from zif.engine.kv_tiers import kv_fingerprint
from zif.engine.outputs import RequestOutput
from zif.errors import ConfigError, EngineError
from zif.null.runner import NullRunner, expected_token

LIMITS = {"platform": "null", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_bytes": 1024}
PROMPTS = [[5 + i + (position * 7 + i) % 40 for position in range(40)] for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama2", tmp_path_factory.mktemp("model"))


def ask(llm: LLM, *prompts: list[int]) -> list[RequestOutput]:
    """Generate, and check every token."""
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False), use_tqdm=False)
    for output in outputs:
        known = list(output.prompt_token_ids)
        for token_id in output.outputs[0].token_ids:
            assert token_id == expected_token(known, llm.model.kv_specs, llm.model.vocab_size)
            known.append(token_id)
        assert len(known) == len(output.prompt_token_ids) + 8
    llm.engine.check_integrity()
    return outputs


def test_without_tiers_everything_cached_is_on_the_device(model: Path) -> None:
    with LLM(model, **LIMITS) as llm:
        ask(llm, *PROMPTS)
        output = ask(llm, PROMPTS[-1])[0]
        assert output.num_cached_tokens == 32
        assert output.cached_tokens_by_tier == {"device": 32}
        assert ask(llm, PROMPTS[0])[0].num_cached_tokens == 0


def test_hits_are_reported_by_tier(model: Path, tmp_path: Path) -> None:
    tiers = {"host_kv_bytes": 768, "disk_kv_bytes": "1MiB", "disk_kv_path": str(tmp_path)}
    with LLM(model, **LIMITS, **tiers) as llm:
        ask(llm, *PROMPTS)
        tiers_hit = [ask(llm, prompt)[0].cached_tokens_by_tier for prompt in PROMPTS]
        assert all(sum(hit.values()) == 32 for hit in tiers_hit)
        assert any(hit["host"] for hit in tiers_hit)
        assert any(hit["disk"] for hit in tiers_hit)


def test_a_restart_finds_prefixes_on_disk_and_a_corrupt_file_costs_time_only(model: Path, tmp_path: Path) -> None:
    tiers = {"disk_kv_bytes": "1MiB", "disk_kv_path": str(tmp_path)}
    with LLM(model, **LIMITS, **tiers) as llm:
        ask(llm, *PROMPTS)
    with LLM(model, **LIMITS, **tiers) as llm:
        assert ask(llm, PROMPTS[0])[0].cached_tokens_by_tier == {"device": 0, "disk": 32}
    for file in tmp_path.rglob("*.kv"):
        file.write_bytes(file.read_bytes()[:-3] + b"\0\1\2")
    with LLM(model, **LIMITS, **tiers) as llm:
        output = ask(llm, PROMPTS[0])[0]
        assert output.metrics is not None
        assert (output.metrics.num_preemptions, output.metrics.num_recoveries) == (0, 1)
        assert ask(llm, PROMPTS[0])[0].cached_tokens_by_tier == {"device": 32, "disk": 0}


def test_closing_keeps_what_host_memory_held(model: Path, tmp_path: Path) -> None:
    tiers = {"host_kv_bytes": "1MiB", "disk_kv_bytes": "1MiB", "disk_kv_path": str(tmp_path)}
    with LLM(model, **LIMITS, **tiers) as llm:
        ask(llm, *PROMPTS)
    assert list(tmp_path.rglob("*.kv"))
    with LLM(model, **LIMITS, **tiers) as llm:
        assert ask(llm, PROMPTS[0])[0].cached_tokens_by_tier["disk"] == 32


def test_another_model_finds_nothing(model: Path, tmp_path: Path) -> None:
    tiers = {"disk_kv_bytes": "1MiB", "disk_kv_path": str(tmp_path / "kv")}
    other = build_checkpoint("llama2", tmp_path / "other")
    for file in other.glob("*.safetensors"):
        os.utime(file, ns=(1, 1))
    with LLM(model, **LIMITS, **tiers) as llm:
        ask(llm, *PROMPTS)
        fingerprint = kv_fingerprint(llm._planned)
    with LLM(other, **LIMITS, **tiers) as llm:
        assert kv_fingerprint(llm._planned) != fingerprint
        assert ask(llm, PROMPTS[0])[0].num_cached_tokens == 0
    with LLM(model, **LIMITS) as llm:
        assert kv_fingerprint(llm._planned) == fingerprint


def test_a_crowd_that_is_swapped_says_the_same(model: Path) -> None:
    limits = LIMITS | {"enable_prefix_caching": False, "expected_output_percent": 0}
    with LLM(model, **limits, host_kv_bytes="1MiB") as llm:
        outputs = ask(llm, *[prompt[: 9 + i] for i, prompt in enumerate(PROMPTS)])
        assert any(output.metrics and output.metrics.num_preemptions for output in outputs)


def test_engines_share_a_remote_tier(model: Path) -> None:
    remote = FlakyRemote()
    with LLM(model, remote_kv=remote, host_kv_bytes=512, **LIMITS) as llm:
        ask(llm, *PROMPTS)
    with LLM(model, remote_kv=remote, **LIMITS) as llm:
        assert ask(llm, PROMPTS[0])[0].cached_tokens_by_tier == {"device": 0, "remote": 32}
        remote.fails = True
        assert ask(llm, PROMPTS[1])[0].num_cached_tokens == 0


def test_a_runner_that_serves_no_copies_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NullRunner, "attach_store", ModelRunner.attach_store)
    with pytest.raises(EngineError, match="NullRunner copies no KV blocks"):
        LLM(model, **LIMITS, host_kv_bytes="1MiB")
    LLM(model, **LIMITS).close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"disk_kv_bytes": 100}, "give both or neither"),
        ({"disk_kv_path": "x"}, "give both or neither"),
        ({"disk_kv_bytes": 100, "disk_kv_path": "x", "enable_prefix_caching": False}, "no meaning"),
        ({"host_kv_bytes_per_s": "8GB"}, "no meaning without host_kv_bytes"),
        ({"prefill_tokens_per_s": 100}, "no meaning without host_kv_bytes"),
        ({"host_kv_bytes": -1}, "host_kv_bytes=-1"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(model: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(model, **LIMITS, **settings)


def test_the_cost_model_reaches_the_block_manager(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[StepPlan] = []
    submit = NullRunner.submit

    def noted(runner: NullRunner, step: StepPlan) -> StepFuture:
        plans.append(step)
        return submit(runner, step)

    monkeypatch.setattr(NullRunner, "submit", noted)
    limits = LIMITS | {"enable_prefix_caching": False, "expected_output_percent": 0}
    with LLM(model, **limits, host_kv_bytes="1MiB", host_kv_bytes_per_s=1, prefill_tokens_per_s=10**6) as llm:
        outputs = ask(llm, *[prompt[: 9 + i] for i, prompt in enumerate(PROMPTS)])
        assert any(output.metrics and output.metrics.num_preemptions for output in outputs)
    assert not any(plan.transfers for plan in plans)
