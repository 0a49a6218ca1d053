"""L5, tiers: KV that leaves the device for host memory and comes back changes no token."""

import contextlib
from collections.abc import Iterator

import pytest

from zif import LLM
from zif.contract import Feature
from zif.errors import EngineError
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.models import TinyModels, answer, families, greedy, hold_answers, prompt_tokens

# Copies cost nothing and prompts much, so that who loses its blocks is swapped.
_HOST = {"host_kv_bytes": 16 << 20, "host_kv_bytes_per_s": 1 << 50, "prefill_tokens_per_s": 1}

by_family = pytest.mark.parametrize("family", families("dense", "window", "hybrid"))


@contextlib.contextmanager
def _short_of_memory(tiny: TinyModels, family: str, **changes: object) -> Iterator[LLM]:
    """Open the model with hardly any KV memory and room on the host, where the runner copies blocks.

    One that does not says so at the start, and has to work without.
    """
    options = {"expected_output_percent": 0, **changes}
    try:
        opened = tiny.open_cramped(family, **_HOST, **options)
    except EngineError as error:
        if "copies no KV blocks" not in str(error):
            raise
        opened = tiny.open_cramped(family, **options)
    with opened:
        yield opened


@conforms(level="L5", gate="G7", clause=("10.3", "10.10"), negative=True)
@by_family
def test_requests_that_are_swapped_go_on(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    length = tiny.max_model_len - 24
    with _short_of_memory(tiny, family, enable_prefix_caching=False) as llm:
        outputs = answer(llm, [prompt_tokens(17, n) for n in range(6)], greedy(length))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    hold_answers(tiny.truth(family), record_gate, outputs, length)


@conforms(level="L5", gate="G7", clause=("10.3", "10.10"), claims=(Feature.PREFIX_CACHING,), negative=True)
@by_family
def test_prefixes_come_back_from_the_host(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    prompts = [prompt_tokens(2 * tiny.block_size + 1 + n, n) for n in range(6)]
    with _short_of_memory(tiny, family) as llm:
        outputs = [*answer(llm, prompts, greedy(40))]
        again = [answer(llm, [prompt], greedy(6))[0] for prompt in prompts]
    hold_answers(tiny.truth(family), record_gate, outputs, 40)
    hold_answers(tiny.truth(family), record_gate, again, 6)
    tiers = [output.cached_tokens_by_tier for output in again]
    if any("host" in tier for tier in tiers):
        assert any(tier["host"] for tier in tiers), "nothing came from the host"
