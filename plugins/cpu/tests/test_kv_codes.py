"""KV as codes of 8 bits through the whole engine: near to plain KV, and the same whatever happens to a request."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from support.checkpoints import build_checkpoint
from support.greedy_parity import FailingReserve, prompts, settings
from zif import LLM, RequestOutput, SamplingParams
from zif.contract import AttentionSpec, RecurrentStateSpec, StepFuture, StepPlan
from zif.engine.planning import plan_model
from zif.kv import PagedBlockManager
from zif.runtime.runner import TorchRunner
from zif.settings import EngineSettings

CODES: dict[str, object] = {"kv_cache_dtype": "int8"}
DECIDED = 0.02
"""Sums in another order move a code to its neighbour now and then: a lead of logits below this may turn."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, detokenize=False, logprobs=2)
MODELS = (
    ("llama3", "native"),
    ("gemma2", "native"),
    ("gpt_oss", "native"),
    ("qwen3_moe", "native"),
    ("llama3", "transformers"),
    ("qwen3_next", "transformers"),
)

by_model = pytest.mark.parametrize(("family", "implementation"), MODELS)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@functools.cache
def checkpoint(family: str, root: Path) -> Path:
    return build_checkpoint(family, root / family)


def cramped(model: Path, **values: object) -> EngineSettings:
    """Return settings under which one request of full length fits, and hardly a second."""
    blocks = {"block_size": 8, "max_num_batched_tokens": 32, "expected_output_percent": 0, **values}
    groups = plan_model(settings(model, kv_bytes=1 << 24, **blocks)).plan.kv_groups
    num_bytes = 14 * sum(group.layout.block_bytes for group in groups)
    return settings(model, kv_bytes=num_bytes, **blocks)


def answers(llm: LLM) -> list[RequestOutput]:
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts()]
    outputs = llm.generate(given, GREEDY, use_tqdm=False)
    llm.engine.check_integrity()
    return outputs


@functools.cache
def unhurried(family: str, implementation: str, root: Path) -> list[RequestOutput]:
    with LLM.from_settings(settings(checkpoint(family, root), model_impl=implementation, **CODES)) as llm:
        return answers(llm)


def assert_same_where_decided(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """Compare tokens up to the first that was a matter of rounding."""
    num_compared = 0
    for output, other in zip(outputs, expected, strict=True):
        entries = other.outputs[0].logprobs
        assert entries is not None
        for got, token, entry in zip(output.outputs[0].token_ids, other.outputs[0].token_ids, entries, strict=True):
            first, second = sorted((e.logprob for e in entry.values()), reverse=True)[:2]
            if first - second < DECIDED:
                break
            assert got == token
            num_compared += 1
    assert num_compared > len(expected) * GREEDY.max_tokens // 2, "too little was decided to compare"


@by_model
@pytest.mark.parametrize("budget", [7, 64])
def test_log_probabilities_stay_near_those_of_plain_kv(
    family: str, implementation: str, budget: int, root: Path
) -> None:
    options = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=288)
    rows = []
    for dtype in ("auto", "int8"):
        conditions = {"model_impl": implementation, "max_num_batched_tokens": budget, "kv_cache_dtype": dtype}
        with LLM.from_settings(settings(checkpoint(family, root), **conditions)) as llm:
            (output,) = llm.generate([{"prompt_token_ids": list(prompts()[7])}], options, use_tqdm=False)
        assert output.prompt_logprobs is not None
        entries = [entry for entry in output.prompt_logprobs if entry]
        rows.append(torch.tensor([[entry[token].logprob for token in sorted(entry)] for entry in entries]))
    difference = (rows[1] - rows[0]).abs()
    assert 0 < difference.mean() < 0.06 * rows[0].std()


@by_model
def test_the_same_again_gives_the_same_tokens(family: str, implementation: str, root: Path) -> None:
    with LLM.from_settings(settings(checkpoint(family, root), model_impl=implementation, **CODES)) as llm:
        again = answers(llm)
    expected = unhurried(family, implementation, root)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in expected]


@by_model
def test_cuts_of_prompts_prefixes_and_preemption_change_no_token(
    family: str, implementation: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for budget, caching, preempting in itertools.product((7, 64), (True, False), (False, True)):
        if preempting:
            failing = FailingReserve()
            monkeypatch.setattr(PagedBlockManager, "reserve", lambda *args, failing=failing: failing(*args))
        conditions = {"max_num_batched_tokens": budget, "enable_prefix_caching": caching, **CODES}
        with LLM.from_settings(settings(checkpoint(family, root), model_impl=implementation, **conditions)) as llm:
            outputs = answers(llm)
            cached = answers(llm)
        monkeypatch.undo()
        assert_same_where_decided(outputs, unhurried(family, implementation, root))
        assert_same_where_decided(cached, unhurried(family, implementation, root))
        assert any(output.num_cached_tokens for output in cached) == caching
        assert bool(sum(output.metrics.num_preemptions for output in outputs if output.metrics)) == preempting


@by_model
def test_codes_that_were_swapped_out_come_back(
    family: str, implementation: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, copied = TorchRunner.submit, [0, 0]

    def counted(runner: TorchRunner, step: StepPlan) -> StepFuture:
        if step.transfers is not None:
            copied[0] += len(step.transfers.saves)
            copied[1] += len(step.transfers.loads)
        return submit(runner, step)

    monkeypatch.setattr(TorchRunner, "submit", counted)
    tiers = {"host_kv_bytes": 1 << 24, "enable_prefix_caching": False, "model_impl": implementation, **CODES}
    with LLM.from_settings(cramped(checkpoint(family, root), **tiers)) as llm:
        outputs = answers(llm)
    assert_same_where_decided(outputs, unhurried(family, implementation, root))
    assert copied[0] == copied[1] > 0


def test_codes_are_found_on_disk_after_a_restart_and_by_nobody_else(root: Path, tmp_path: Path) -> None:
    disk = {"disk_kv_bytes": 1 << 24, "disk_kv_path": str(tmp_path)}
    prompt = {"prompt_token_ids": list(prompts()[4])}
    found = []
    for dtype in ("int8", "int8", "auto", "auto"):
        with LLM.from_settings(cramped(checkpoint("llama3", root), kv_cache_dtype=dtype, **disk)) as llm:
            output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
            found.append(output.cached_tokens_by_tier["disk"])
            if dtype == "int8":
                assert_same_where_decided([output], [unhurried("llama3", "native", root)[4]])
            answers(llm)
    assert found[1] > 0
    assert (found[0], found[2]) == (0, 0)


@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_codes_of_more_tokens_fit_in_the_same_memory(dtype: str, element_bytes: int, root: Path) -> None:
    num_tokens = []
    for kv_dtype in ("auto", "int8"):
        chosen = settings(checkpoint("llama3", root), dtype=dtype, kv_bytes=1 << 22, kv_cache_dtype=kv_dtype)
        with LLM.from_settings(chosen) as llm:
            (group,) = llm.arena.groups
            num_tokens.append(llm.arena.num_cells(0) * group.spec.block_size)
        assert isinstance(group.spec, AttentionSpec)
        assert group.spec.dtype == (dtype if kv_dtype == "auto" else "int8")
    head_dim = group.spec.head_dim
    assert num_tokens[1] / num_tokens[0] == pytest.approx(head_dim * element_bytes / (head_dim + 4), rel=0.02)


def test_states_keep_their_dtypes_beside_codes(root: Path) -> None:
    chosen = settings(checkpoint("qwen3_next", root), kv_bytes=1 << 22, **CODES)
    with LLM.from_settings(chosen) as llm:
        dtypes = {type(group.spec).__name__: group.spec.dtype for group in llm.plan.kv_groups}
        states = [group.spec for group in llm.plan.kv_groups if isinstance(group.spec, RecurrentStateSpec)]
    assert dtypes == {"FullAttentionSpec": "int8", "RecurrentStateSpec": "float32"}
    assert {tensor.dtype for state in states for tensor in state.tensors} == {"float32"}
