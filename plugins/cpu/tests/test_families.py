"""Every model family through the whole engine on this platform, against transformers' own `generate` and logits.

The conditions are those that must never change a token: how prompts are cut into steps, whether prefixes are reused,
whether requests lose their blocks on the way, and how large blocks are.
"""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.checkpoints import FAMILIES, build_checkpoint
from zif import LLM, RequestOutput, SamplingParams
from zif.contract import Request, RequestStatus
from zif.kv import PagedBlockManager
from zif.settings import EngineSettings

MAX_MODEL_LEN = 64
"""Not beyond the length at which a long-range rotary embedding changes its factors for every sequence."""
NUM_OUTPUT_TOKENS = 14
PROMPT_LENGTHS = (1, 5, 16, 17, 31, 40, 40, 49)
LOGPROB_TOLERANCE = 1e-4
IMPLEMENTATIONS = ("native", "transformers")


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Mixed lengths around block borders; the last three begin alike."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(5, 120, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    drawn[6] = drawn[5][:33] + drawn[6][33:]
    drawn[7] = drawn[5] + drawn[7][40:]
    return tuple(map(tuple, drawn))


@functools.cache
def checkpoint(family: str, root: Path) -> Path:
    return build_checkpoint(family, root / family)


@functools.cache
def reference(family: str, root: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[torch.Tensor, ...]]:
    """Return transformers' greedy continuations and its log-probabilities over the longest prompts."""
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(family, root), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    continuations, logprobs = [], []
    with torch.inference_mode():
        for prompt in prompts():
            ids = torch.tensor([prompt])
            whole = model.generate(ids, max_new_tokens=NUM_OUTPUT_TOKENS, do_sample=False, pad_token_id=0)
            continuations.append(tuple(whole[0, len(prompt) :].tolist()))
            logprobs.append(model(ids).logits[0].float().log_softmax(-1))
    return tuple(continuations), tuple(logprobs)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def settings(model: Path, implementation: str, **changes: object) -> EngineSettings:
    values = {
        "model": str(model),
        "platform": "cpu",
        "model_impl": implementation,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
    }
    return EngineSettings.from_values(values | changes)


class FailingReserve:
    """Refuse blocks to running requests at fixed calls, so that some are preempted however much memory there is."""

    REFUSED = frozenset({1, 3, 4, 8, 9, 13})

    def __init__(self) -> None:
        self._reserve = PagedBlockManager.reserve
        self._calls = itertools.count()

    def __call__(self, manager: PagedBlockManager, request: Request, num_tokens: int) -> bool:
        refused = request.status is RequestStatus.RUNNING and next(self._calls) in self.REFUSED
        return not refused and self._reserve(manager, request, num_tokens)


def generate(llm: LLM) -> list[RequestOutput]:
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts()], greedy, use_tqdm=False)
    llm.engine.check_integrity()
    return outputs


@pytest.mark.parametrize("budget", [1, 7, 64])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(
    family: str, implementation: str, block_size: int, budget: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(family, root)
    expected = reference(family, root)[0]
    for caching, preempting in itertools.product((True, False), (False, True)):
        if preempting:
            failing = FailingReserve()
            monkeypatch.setattr(PagedBlockManager, "reserve", lambda *args, failing=failing: failing(*args))
        condition = settings(
            model,
            implementation,
            block_size=block_size,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        with LLM.from_settings(condition) as llm:
            outputs = generate(llm)
        monkeypatch.undo()
        tokens = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
        assert tokens == expected, f"caching={caching}, preempting={preempting}"
        num_preemptions = sum(output.metrics.num_preemptions for output in outputs if output.metrics)
        assert bool(num_preemptions) == preempting


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forced_logits_equal_transformers(family: str, implementation: str, budget: int, root: Path) -> None:
    model = checkpoint(family, root)
    expected = reference(family, root)[1]
    every_token = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=expected[0].shape[1])
    with LLM.from_settings(settings(model, implementation, max_num_batched_tokens=budget)) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts()], every_token, use_tqdm=False
        )
    for output, reference_logprobs in zip(outputs, expected, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            row = torch.tensor([entry[token_id].logprob for token_id in range(reference_logprobs.shape[1])])
            difference = (row - reference_logprobs[position]).abs().max().item()
            assert difference <= LOGPROB_TOLERANCE, f"position {position}: {difference}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_second_identical_prompt_computes_one_block_and_one_token_at_most(
    family: str, implementation: str, root: Path
) -> None:
    block_size = 16
    prompt = {"prompt_token_ids": list(prompts()[7])}
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
    with LLM.from_settings(settings(checkpoint(family, root), implementation, block_size=block_size)) as llm:
        cold, warm = (llm.generate(prompt, greedy, use_tqdm=False)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert len(warm.prompt_token_ids) - warm.num_cached_tokens <= block_size + 1
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
