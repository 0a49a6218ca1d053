"""The engine on this platform, where options of sampling, numerics and memory are real."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.errors import OutOfMemoryError
from zif.host.memory import HostAllocator

PROMPTS = [[5, 9, 13], list(range(20, 60)), [7], list(range(90, 107)), [33] * 30, [41, 42]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, platform="cpu", max_model_len=128, max_num_seqs=8) as llm:
        yield llm


def generate(llm: LLM, prompts: list[list[int]], *options: SamplingParams) -> list[list[int]]:
    params = options[0] if len(options) == 1 else list(options)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    llm.engine.check_integrity()
    return [sample.token_ids for output in outputs for sample in output.outputs]


def random_sampling(seed: int | None = 7, **options: object) -> SamplingParams:
    values = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "max_tokens": 12, "ignore_eos": True, "seed": seed}
    return SamplingParams(**(values | options))  # type: ignore[arg-type]


FIRST_TOKENS = """
import gc, sys
from zif import LLM, SamplingParams

with LLM(sys.argv[1], platform="cpu", max_model_len=64) as llm:
    llm.generate([{"prompt_token_ids": [5, 9, 13]}], SamplingParams(max_tokens=1), use_tqdm=False)
    num_full = gc.get_stats()[2]["collections"]
    llm.generate([{"prompt_token_ids": [5]}], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
print([name for name in sys.argv[2:] if name in sys.modules], num_full)
"""

NOT_FOR_FIRST_TOKENS = (
    "jinja2",
    "llguidance",
    "mpmath",
    "msgspec",
    "psutil",
    "pydantic",
    "starlette",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
    "triton",
    "zif.serving",
    "zif.simulation",
    "zif_amd.device",
)


def test_first_tokens_need_neither_servers_nor_compilers_nor_full_garbage_collections(model: Path) -> None:
    command = [sys.executable, "-c", FIRST_TOKENS, str(model), *NOT_FOR_FIRST_TOKENS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_seeded_request_gives_the_same_tokens_alone_and_in_any_batch(llm: LLM) -> None:
    options = [random_sampling(seed) for seed in range(len(PROMPTS))]
    alone = [generate(llm, [prompt], option)[0] for prompt, option in zip(PROMPTS, options, strict=True)]
    together = generate(llm, PROMPTS, *options)
    backwards = generate(llm, PROMPTS[::-1], *options[::-1])[::-1]
    assert alone == together == backwards
    assert len(set(map(tuple, alone))) == len(PROMPTS)


def test_seeded_request_survives_preemption_and_small_steps(model: Path, llm: LLM) -> None:
    options = [random_sampling(seed, max_tokens=40) for seed in range(len(PROMPTS))]
    expected = generate(llm, PROMPTS, *options)
    tight = {"kv_bytes": 13 * llm.plan.kv_groups[0].layout.block_bytes, "max_num_batched_tokens": 5}
    with LLM(model, platform="cpu", max_model_len=128, max_num_seqs=8, **tight) as small:
        outputs = small.generate([{"prompt_token_ids": p} for p in PROMPTS], options, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert sum(o.metrics.num_preemptions for o in outputs if o.metrics) > 0


def test_requests_without_seed_differ_and_repeat_with_the_engines_seed(model: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        with LLM(model, platform="cpu", max_model_len=128, seed=seed) as llm:
            runs.append(generate(llm, [PROMPTS[0]] * 3, random_sampling(None)))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(map(tuple, runs[0]))) == 3


def test_samples_of_one_prompt_equal_requests_of_their_own_seeds(llm: LLM) -> None:
    together = generate(llm, [PROMPTS[1]], random_sampling(100, n=4))
    apart = generate(llm, [PROMPTS[1]] * 4, *(random_sampling(100 + i) for i in range(4)))
    assert together == apart
    assert len(set(map(tuple, together))) == 4


def test_logprobs_are_those_of_the_model(llm: LLM) -> None:
    options = SamplingParams(temperature=0.0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": PROMPTS[3]}, options, use_tqdm=False)[0]
    sample = output.outputs[0]
    assert sample.logprobs is not None
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPTS[3])
    for token_id, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert entry[token_id].rank == 1
        assert entry[token_id].logprob == max(e.logprob for e in entry.values())
    assert sample.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(sample.token_ids, sample.logprobs, strict=True))
    )
    # The prompt extended by the sampled tokens must report the same numbers as sampling them did.
    longer = {"prompt_token_ids": PROMPTS[3] + sample.token_ids}
    again = llm.generate(longer, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
    assert again is not None
    for token_id, entry, repeated in zip(sample.token_ids, sample.logprobs, again[len(PROMPTS[3]) :], strict=True):
        assert repeated is not None
        assert repeated[token_id].logprob == pytest.approx(entry[token_id].logprob, abs=1e-5)


def test_min_tokens_holds_back_every_end(llm: LLM) -> None:
    free = generate(llm, [PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))[0]
    early = free[2]
    options = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=7, stop_token_ids=[early], ignore_eos=True)
    held = generate(llm, [PROMPTS[0]], options)[0]
    assert early not in held[:7]
    assert len(held) >= 7


def test_allowed_and_bad_words_bound_the_output(llm: LLM) -> None:
    allowed = [50, 60, 70]
    assert set(generate(llm, [PROMPTS[0]], random_sampling(allowed_token_ids=allowed))[0]) <= set(allowed)
    text = (
        llm.generate({"prompt_token_ids": PROMPTS[0]}, random_sampling(max_tokens=30), use_tqdm=False)[0]
        .outputs[0]
        .text
    )
    letter = next(c for c in text if c.isalpha())
    banned = llm.generate(
        {"prompt_token_ids": PROMPTS[0]}, random_sampling(max_tokens=30, bad_words=[letter]), use_tqdm=False
    )[0].outputs[0]
    word_ids = {tuple(llm.engine.vocabulary.encode(v, add_special_tokens=False)) for v in (letter, " " + letter)}
    assert not {ids for ids in word_ids if len(ids) == 1} & {(t,) for t in banned.token_ids}


def test_repetition_penalty_changes_a_looping_answer(llm: LLM) -> None:
    options = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
    plain = generate(llm, [PROMPTS[4]], SamplingParams(**options))[0]
    penalized = generate(llm, [PROMPTS[4]], SamplingParams(**options, frequency_penalty=2.0))[0]
    assert len(set(penalized)) > len(set(plain))


def test_nan_of_one_request_is_that_requests_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = 77
    embedding = torch.nn.functional.embedding

    def poisoned_embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return embedding(token_ids, weight).masked_fill((token_ids == poison)[:, None], float("nan"))

    prompts = [[5, 6, 7], [8, poison, 9], [10, 11]]
    options = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, allowed_token_ids=list(range(70)))
    with LLM(model, platform="cpu", max_model_len=64) as llm:
        healthy = [generate(llm, [prompt], options)[0] for prompt in (prompts[0], prompts[2])]
        monkeypatch.setattr(torch.nn.functional, "embedding", poisoned_embedding)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
        llm.engine.check_integrity()
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert "NaN logits" in (outputs[1].outputs[0].error or "")
    assert [outputs[0].outputs[0].token_ids, outputs[2].outputs[0].token_ids] == healthy


def test_closing_gives_every_byte_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    start = HostAllocator.__init__

    def remember(self: HostAllocator, *args: object, **options: object) -> None:
        start(self, *args, **options)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(HostAllocator, "__init__", remember)
    with LLM(model, platform="cpu", max_model_len=128) as llm:
        stats = made[0].stats()
        assert dict(stats.by_tag)["kv"] == llm.arena.num_bytes
        assert dict(stats.by_tag)["weights"] >= llm.model.weight_bytes
    assert made[0].stats().allocated_bytes == 0


def test_memory_that_runs_out_while_loading_is_given_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = [], []
    allocate = HostAllocator._allocate

    def fail_at_the_fifth(self: HostAllocator, num_bytes: int, alignment: int) -> torch.Tensor:
        made.append(self)
        calls.append(num_bytes)
        if len(calls) == 5:
            raise OutOfMemoryError("injected")
        return allocate(self, num_bytes, alignment)

    monkeypatch.setattr(HostAllocator, "_allocate", fail_at_the_fifth)
    with pytest.raises(OutOfMemoryError, match="injected"):
        LLM(model, platform="cpu", max_model_len=128)
    assert made[0].stats().allocated_bytes == 0
    with LLM(model, platform="cpu", max_model_len=128) as llm:
        assert generate(llm, [PROMPTS[0]], SamplingParams(max_tokens=2))


def test_log_probabilities_sum_to_one(llm: LLM) -> None:
    options = SamplingParams(max_tokens=1, temperature=0.0, logprobs=llm.model.vocab_size, ignore_eos=True)
    entry = llm.generate({"prompt_token_ids": PROMPTS[0]}, options, use_tqdm=False)[0].outputs[0].logprobs
    assert entry is not None
    assert math.fsum(math.exp(e.logprob) for e in entry[0].values()) == pytest.approx(1.0, abs=1e-5)
