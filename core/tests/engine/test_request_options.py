"""What a request may say about its place in line: tenant and time limit, through the public interface."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def fair(model: Path) -> Iterator[LLM]:
    options = {"max_model_len": 64, "max_num_seqs": 1, "scheduling_policy": "fair", "tenant_weights": "b=2"}
    with LLM(model, platform="null", **options) as llm:
        yield llm


def prompt(token: int, **options: object) -> dict[str, object]:
    return {"prompt_token_ids": [token], **options}


def sampling(max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def test_a_tenant_gets_its_share(fair: LLM) -> None:
    crowd = [prompt(5, tenant="a") for _ in range(9)]
    *others, late = fair.generate([*crowd, prompt(6, tenant="b")], sampling(), use_tqdm=False)
    ends = sorted(output.metrics.finished_s for output in others if output.metrics)
    assert late.metrics is not None
    assert late.metrics.finished_s < ends[3]


def test_without_a_tenant_the_salt_says_whose_share_it_is(fair: LLM) -> None:
    crowd = [prompt(5, cache_salt="a") for _ in range(9)]
    *others, late = fair.generate([*crowd, prompt(6, cache_salt="b")], sampling(), use_tqdm=False)
    ends = sorted(output.metrics.finished_s for output in others if output.metrics)
    assert late.metrics is not None
    assert late.metrics.finished_s < ends[3]


def test_a_tenant_that_would_be_ignored_is_refused(model: Path) -> None:
    with (
        LLM(model, platform="null", max_model_len=64) as llm,
        pytest.raises(RequestError, match="tenant='a' has no meaning under scheduling_policy='fcfs'"),
    ):
        llm.generate(prompt(5, tenant="a"), sampling(), use_tqdm=False)


def test_weights_that_would_be_ignored_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="tenant_weights"):
        LLM(model, platform="null", tenant_weights="a=2")


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), "soon", True])
def test_a_time_limit_is_a_positive_number(fair: LLM, timeout_s: object) -> None:
    with pytest.raises(RequestError, match="timeout_s="):
        fair.generate(prompt(5, timeout_s=timeout_s), sampling(), use_tqdm=False)


def test_past_its_time_limit_an_answer_is_aborted_with_the_reason(fair: LLM) -> None:
    late, other = fair.generate([prompt(5, timeout_s=1e-9), prompt(6)], sampling(), use_tqdm=False)
    assert (late.finished, late.outputs[0].finish_reason) == (True, "abort")
    assert "deadline passed" in (late.outputs[0].error or "")
    assert other.outputs[0].finish_reason == "length"
    fair.engine.check_integrity()


def test_an_answer_in_time_is_whole(fair: LLM) -> None:
    output = fair.generate(prompt(5, timeout_s=600.0), sampling(), use_tqdm=False)[0]
    assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 6)


def test_streaming_ends_at_the_time_limit(fair: LLM) -> None:
    outputs = list(fair.stream(prompt(5, timeout_s=1e-9), sampling()))
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort"]


def test_a_tenant_past_its_quota_finds_its_older_prompt_gone(model: Path) -> None:
    options = {"max_model_len": 64, "block_size": 4, "kv_bytes": "4MiB", "enable_prefix_caching": True}
    with LLM(model, platform="null", tenant_cache_percent="a=0", **options) as llm:
        for tenant, num_cached in (("a", 0), ("b", 8)):
            asked = {"prompt_token_ids": [ord(tenant)] * 9, "tenant": tenant}
            llm.generate([asked], sampling(1), use_tqdm=False)
            (again,) = llm.generate([asked], sampling(1), use_tqdm=False)
            assert again.num_cached_tokens == num_cached


@pytest.mark.parametrize(
    ("retention", "complaint"),
    [
        ("long", "list"),
        ([3], "mapping"),
        ([{"end": 3}], "'priority'"),
        ([{"priority": 101}], "0 to 100"),
        ([{"priority": "high"}], "integer"),
        ([{"priority": True}], "integer"),
        ([{"priority": 1, "start": -1}], "start=-1"),
        ([{"priority": 1, "start": 5, "end": 5}], "greater than start=5"),
        ([{"priority": 1, "end": 2.5}], "end=2.5"),
        ([{"priority": 1, "duration_s": float("inf")}], "duration_s=inf"),
        ([{"priority": 1, "until": 3}], "'until'"),
    ],
)
def test_a_wrong_wish_for_retention_is_refused(fair: LLM, retention: object, complaint: str) -> None:
    with pytest.raises(RequestError, match="retention") as caught:
        fair.generate(prompt(5, retention=retention), sampling(), use_tqdm=False)
    assert complaint in str(caught.value)


def test_what_a_caller_wishes_to_keep_outlives_later_prompts(model: Path) -> None:
    options = {"max_model_len": 32, "block_size": 4, "max_num_seqs": 1}
    with LLM(model, platform="null", **options) as llm:
        kept = {"prompt_token_ids": [7] * 9, "retention": [{"priority": 90, "end": 8}]}
        llm.generate([kept, {"prompt_token_ids": [8] * 9}], sampling(1), use_tqdm=False)
        for token in range(10, 40):
            llm.generate({"prompt_token_ids": [token] * 21}, sampling(1), use_tqdm=False)
        found = [llm.generate({"prompt_token_ids": [t] * 9}, sampling(1), use_tqdm=False)[0] for t in (7, 8)]
        assert [output.num_cached_tokens for output in found] == [8, 0]
