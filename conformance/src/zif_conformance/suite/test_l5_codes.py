"""L5, KV of another dtype, above all as codes: it costs what its rounding costs, whatever happens to a request."""

import pytest
import torch

from zif.contract import Feature
from zif.errors import ConfigError, PlanRefusedError
from zif_conformance.marks import cases, conforms
from zif_conformance.oracle.codes import CODED
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.checkpoints import VOCAB_SIZE
from zif_conformance.tiny_models.models import TinyModels, answer, families, greedy, hold_answers, prompt_tokens

CLAIM = f"kv_dtype:{CODED}"
_CODES = {"kv_cache_dtype": CODED}

by_family = pytest.mark.parametrize("family", families("dense", "window", "hybrid"))


@conforms(level="L5", gate="G7", clause=("7.9", "10.2"), claims=(CLAIM,))
@pytest.mark.parametrize("family", families())
def test_greedy_tokens_over_codes(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    lengths = (1, tiny.block_size - 1, tiny.block_size, 3 * tiny.block_size + 2)
    with tiny.open(family, **_CODES) as llm:
        outputs = answer(llm, [prompt_tokens(length, n) for n, length in enumerate(lengths)], greedy(20))
    hold_answers(tiny.truth(family, CODED), record_gate, outputs, 20)


@conforms(level="L5", gate="G7", clause=("3.4", "10.2"), claims=(Feature.ATTENTION_FULL,))
@pytest.mark.parametrize("kv_dtype", cases("kv_dtype", "float32", "bfloat16", "float16"))
def test_greedy_tokens_over_kv_of_another_dtype(tiny: TinyModels, record_gate: GateRecorder, kv_dtype: str) -> None:
    with tiny.open("dense", kv_cache_dtype=kv_dtype) as llm:
        outputs = answer(llm, [prompt_tokens(3 * tiny.block_size + 2), prompt_tokens(5, 1)], greedy(16))
    hold_answers(tiny.truth("dense", kv_dtype), record_gate, outputs, 16)


@conforms(level="L5", gate="G7", clause=("7.9", "10.2"), claims=(CLAIM, Feature.ATTENTION_FULL))
@pytest.mark.parametrize("chunk", [7, 64])
def test_logprobs_of_a_prompt_over_codes(tiny: TinyModels, record_gate: GateRecorder, chunk: int) -> None:
    prompt = prompt_tokens(40)
    with tiny.open("dense", max_num_batched_tokens=chunk, max_num_seqs=2, **_CODES) as llm:
        (output,) = answer(llm, [prompt], greedy(1, prompt_logprobs=VOCAB_SIZE))
    assert output.prompt_logprobs is not None
    rows = [[entry[token].logprob for token in range(VOCAB_SIZE)] for entry in output.prompt_logprobs[1:] if entry]
    tiny.truth("dense", CODED).hold_logprobs(record_gate, prompt[:-1], torch.tensor(rows))


@conforms(
    level="L5", gate="G7", clause=("7.9", "10.2"), claims=(CLAIM, Feature.ATTENTION_FULL, Feature.TRANSFORMERS_BACKEND)
)
def test_greedy_tokens_of_the_generic_backend_over_codes(tiny: TinyModels, record_gate: GateRecorder) -> None:
    with tiny.open("dense", model_impl="transformers", **_CODES) as llm:
        outputs = answer(llm, [prompt_tokens(30), prompt_tokens(5, 1)], greedy(12))
    hold_answers(tiny.truth("dense", CODED), record_gate, outputs, 12)


@conforms(level="L5", gate="G7", clause=("7.9", "10.3"), claims=(CLAIM,), negative=True)
@by_family
def test_requests_over_codes_that_lose_their_blocks_resume(
    tiny: TinyModels, record_gate: GateRecorder, family: str
) -> None:
    length = tiny.max_model_len - 17
    with tiny.open_cramped(family, expected_output_percent=0, enable_prefix_caching=False, **_CODES) as llm:
        outputs = answer(llm, [prompt_tokens(17, n) for n in range(6)], greedy(length))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    hold_answers(tiny.truth(family, CODED), record_gate, outputs, length)


@conforms(level="L5", gate="G7", clause=("7.9", "10.3"), claims=(CLAIM, Feature.PREFIX_CACHING), negative=True)
@by_family
def test_codes_of_a_prefix_found_equal_those_computed(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    block = tiny.block_size
    known = prompt_tokens(3 * block + 2)
    prompts = [[*known[:n], (known[n] + 1) % 256, *prompt_tokens(3, n)] for n in range(block, 2 * block + 2)]
    with tiny.open(family, **_CODES) as llm:
        answer(llm, [known], greedy(4))
        outputs = answer(llm, prompts, greedy(6))
    hold_answers(tiny.truth(family, CODED), record_gate, outputs, 6)
    assert any(output.num_cached_tokens for output in outputs), "no prefix was found"


@conforms(level="L5", gate="G7", clause=("7.9", "10.10"), claims=(CLAIM,), negative=True)
@by_family
def test_codes_that_were_swapped_out_come_back(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    """A runner that copies no blocks computes them again: the answers are the same."""
    length = tiny.max_model_len - 24
    with tiny.open_swapping(family, enable_prefix_caching=False, **_CODES) as llm:
        outputs = answer(llm, [prompt_tokens(17, n) for n in range(6)], greedy(length))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    hold_answers(tiny.truth(family, CODED), record_gate, outputs, length)


@conforms(level="L5", clause=("3.4", "4.3"), claims=(Feature.ATTENTION_FULL,), negative=True)
def test_a_kv_dtype_that_is_not_claimed_is_refused_by_name(tiny: TinyModels) -> None:
    """Before any weight is read; nobody gets KV of another dtype than asked for."""
    for name in {"float32", "bfloat16", "float16", CODED} - {*tiny.capabilities.kv_dtypes}:
        with pytest.raises(PlanRefusedError, match=f"KV dtype '{name}' is not offered"):
            tiny.open("dense", kv_cache_dtype=name).close()
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8'"):
        tiny.open("dense", kv_cache_dtype="fp8").close()
