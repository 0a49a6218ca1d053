"""`batch_invariant` on this platform: not a bit of a request depends on what else runs, or on how its prompt is cut."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.errors import PlanRefusedError
from zif_cpu.library import Library, load_library

# Longer than a step of few tokens and than a tile; odd.
PROMPTS = [[(7 * i * i + 3 * i + n) % 250 + 1 for i in range(length)] for n, length in enumerate((1, 9, 70, 131, 200))]
OPTIONS = SamplingParams(temperature=0.0, max_tokens=6, logprobs=5, prompt_logprobs=2, ignore_eos=True)


@pytest.fixture(autouse=True)
def native() -> None:
    library = load_library()
    if not isinstance(library, Library):
        pytest.skip(library)


def isas() -> list[str]:
    library = load_library()
    return list(library.isas) if isinstance(library, Library) else ["none"]


@pytest.fixture(scope="module", params=["llama3", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(request.param, tmp_path_factory.mktemp("model"))


def opened(model: Path, **changes: object) -> LLM:
    settings = {"platform": "cpu", "max_model_len": 256, "max_num_seqs": 8, "batch_invariant": True}
    return LLM(model, **(settings | changes))


def numbers(llm: LLM, prompts: list[list[int]]) -> Iterator[object]:
    """Yield the tokens of each prompt with all log-probabilities that were asked for."""
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], OPTIONS, use_tqdm=False):
        yield output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bits_are_those_of_the_request_alone(
    model: Path, dtype: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIF_CPU_ISA", isa)
    with opened(model, dtype=dtype, enable_prefix_caching=False) as llm:
        alone = [entry for prompt in PROMPTS for entry in numbers(llm, [prompt])]
        assert list(numbers(llm, PROMPTS)) == alone
        assert list(numbers(llm, PROMPTS[::-1])) == alone[::-1]
    with opened(model, dtype=dtype, enable_prefix_caching=False, max_num_batched_tokens=23) as llm:
        assert list(numbers(llm, PROMPTS)) == alone


def test_kept_prefixes_and_drafts_change_no_bit(model: Path) -> None:
    with opened(model, dtype="bfloat16", enable_prefix_caching=False) as llm:
        alone = [entry[:2] for prompt in PROMPTS for entry in numbers(llm, [prompt])]
    options = SamplingParams(temperature=0.0, max_tokens=6, logprobs=5, ignore_eos=True)
    with opened(model, dtype="bfloat16", speculation="ngram") as llm:
        for _ in range(2):
            outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], options, use_tqdm=False)
            assert [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs] == alone


def test_torch_does_not_claim_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIF_CPU_ISA", "torch")
    with pytest.raises(PlanRefusedError, match="batch_invariant: device 'cpu'"):
        opened(model)


@pytest.mark.parametrize("width", [250, 1000, 50257])
def test_what_torch_computes_by_rows_is_the_same_for_any_number_of_rows(width: int) -> None:
    """Angles, soft caps, shares of experts and log-probabilities are torch's, which promises no such thing."""
    torch.manual_seed(5)
    x = 5 * torch.randn(9, width)
    for function in (torch.cos, torch.sin, torch.tanh, lambda rows: rows.softmax(-1), lambda rows: rows.logsumexp(1)):
        whole = function(x)
        for first, count in ((0, 1), (3, 1), (8, 1), (2, 3), (4, 5)):
            assert torch.equal(function(x[first : first + count].clone()), whole[first : first + count])
