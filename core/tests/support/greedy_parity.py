"""Mixed requests through the whole engine, and what transformers makes of them alone.

The conditions are those that must never change a token: how prompts are cut into steps, whether prefixes are reused,
whether requests lose their blocks on the way.
"""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.checkpoints import build_checkpoint
from zif import LLM, RequestOutput, SamplingParams
from zif.contract import Request, RequestStatus
from zif.kv import PagedBlockManager
from zif.settings import EngineSettings

MAX_MODEL_LEN = 64
"""Not beyond the length at which a long-range rotary embedding changes its factors for every sequence."""
NUM_OUTPUT_TOKENS = 14
PROMPT_LENGTHS = (1, 5, 16, 17, 31, 40, 40, 49)
LOGPROB_TOLERANCE = 1e-4


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


def settings(model: Path, **changes: object) -> EngineSettings:
    values = {
        "model": str(model),
        "platform": "cpu",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
    }
    return EngineSettings.from_values(values | changes)


class FailingReserve:
    """Refuse blocks to generating requests at fixed calls, so that some are preempted however much memory there is."""

    REFUSED = frozenset({0, 2, 3, 7, 8, 12})

    def __init__(self) -> None:
        self._reserve = PagedBlockManager.reserve
        self._calls = itertools.count()

    def __call__(self, manager: PagedBlockManager, request: Request, num_tokens: int) -> bool:
        generates = request.status is RequestStatus.RUNNING and request.num_computed_tokens >= request.num_prompt_tokens
        refused = generates and next(self._calls) in self.REFUSED
        return not refused and self._reserve(manager, request, num_tokens)


def generate(llm: LLM) -> list[RequestOutput]:
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts()], greedy, use_tqdm=False)
    llm.engine.check_integrity()
    return outputs


def assert_greedy_parity(family: str, root: Path, monkeypatch: pytest.MonkeyPatch, **conditions: object) -> None:
    """Generate with and without prefix caching and preemption; every token must be that of transformers."""
    expected = reference(family, root)[0]
    for caching, preempting in itertools.product((True, False), (False, True)):
        if preempting:
            failing = FailingReserve()
            monkeypatch.setattr(PagedBlockManager, "reserve", lambda *args, failing=failing: failing(*args))
        condition = settings(checkpoint(family, root), enable_prefix_caching=caching, **conditions)
        with LLM.from_settings(condition) as llm:
            outputs = generate(llm)
        monkeypatch.undo()
        tokens = tuple(tuple(output.outputs[0].token_ids) for output in outputs)
        assert tokens == expected, f"caching={caching}, preempting={preempting}"
        num_preemptions = sum(output.metrics.num_preemptions for output in outputs if output.metrics)
        assert bool(num_preemptions) == preempting, f"{num_preemptions} preemptions, caching={caching}"


def assert_logit_parity(family: str, root: Path, tolerance: float = LOGPROB_TOLERANCE, **conditions: object) -> None:
    """Ask for the log-probabilities of all prompt tokens; every one must be close to that of transformers."""
    expected = reference(family, root)[1]
    every_token = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=expected[0].shape[1])
    with LLM.from_settings(settings(checkpoint(family, root), **conditions)) as llm:
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
            assert difference <= tolerance, f"position {position}: {difference}"
