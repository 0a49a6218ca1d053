"""Every model family through the whole engine on this platform, against transformers' own `generate` and logits.

The conditions are those that must never change a token: how prompts are cut into steps, whether prefixes are reused,
whether requests lose their blocks on the way, and how large blocks are.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from support.checkpoints import FAMILIES
from support.greedy_parity import (
    NUM_OUTPUT_TOKENS,
    assert_greedy_parity,
    assert_logit_parity,
    checkpoint,
    prompts,
    settings,
)
from zif import LLM, SamplingParams
from zif_cpu import programs, ranges
from zif_cpu.library import choose_kernels
from zif_cpu.programs import Program

IMPLEMENTATIONS = ("native", "transformers")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(
    family: str, implementation: str, block_size: int, budget: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = {"model_impl": implementation, "block_size": block_size, "max_num_batched_tokens": budget}
    assert_greedy_parity(family, root, monkeypatch, **conditions)


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forced_logits_equal_transformers(family: str, implementation: str, budget: int, root: Path) -> None:
    assert_logit_parity(family, root, model_impl=implementation, max_num_batched_tokens=budget)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_identical_prompt_computes_one_block_and_one_token_at_most(
    family: str, implementation: str, root: Path
) -> None:
    block_size = 16
    prompt = {"prompt_token_ids": list(prompts()[7])}
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
    with LLM.from_settings(settings(checkpoint(family, root), model_impl=implementation, block_size=block_size)) as llm:
        cold, warm = (llm.generate(prompt, greedy, use_tqdm=False)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert len(warm.prompt_token_ids) - warm.num_cached_tokens <= block_size + 1
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


@pytest.mark.skipif(choose_kernels(None).isa is None, reason="no native kernels here: there is nothing to record")
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_few_tokens_are_recorded(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation that cannot be repeated makes all steps of a model run call by call, which nothing else shows."""
    repeated = []
    run = Program.__call__
    monkeypatch.setattr(Program, "__call__", lambda *arguments: repeated.append(1) or run(*arguments))
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    with LLM.from_settings(settings(checkpoint(family, root), model_impl="native")) as llm:
        llm.generate({"prompt_token_ids": list(prompts()[7])}, greedy, use_tqdm=False)
    assert repeated


@pytest.mark.skipif(choose_kernels(None).isa is None, reason="no native kernels here: there is nothing to record")
@pytest.mark.parametrize("family", FAMILIES)
def test_programs_of_many_tokens_change_no_bit(family: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Batch-invariant: all products are native, of any instruction set and dtype.
    conditions = {"max_num_batched_tokens": 256, "batch_invariant": True, "enable_prefix_caching": False}
    steps = [(40, 30), (40, 40), (45, 45), (40, 45), (20, 25, 35), (41, 34), (32, 40), (44, 44), (30, 30, 30), (50, 40)]
    steps += [(44, 44), (41, 44)]
    used: list[int] = []
    run = Program.__call__

    def noted(program: Program, inputs: ranges.Inputs, prepared: Mapping[int, programs.Prepared]) -> torch.Tensor:
        used.append(len(inputs.token_ids))
        return run(program, inputs, prepared)

    def answers() -> list[object]:
        greedy = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=5)
        found = []
        with LLM.from_settings(settings(checkpoint(family, root), model_impl="native", **conditions)) as llm:
            for lengths in steps:
                given = [{"prompt_token_ids": [5 + (7 * at + n) % 110 for at in range(n)]} for n in lengths]
                outputs = [answer.outputs[0] for answer in llm.generate(given, greedy, use_tqdm=False)]
                found.append([(output.token_ids, output.logprobs) for output in outputs])
        return found

    monkeypatch.setattr(Program, "__call__", noted)
    expected = answers()
    if family == "llama3":
        assert [number for number in used if number > programs.MAX_TOKENS] == [80, 90, 88, 85]
    monkeypatch.setattr(programs, "MAX_TORCH_CALLS_OF_MANY", -1)
    used.clear()
    assert answers() == expected
    assert max(used, default=0) <= programs.MAX_TOKENS
