"""L5, tiers: KV that leaves the device for host memory and comes back changes no token."""

import pytest

from zif.contract import Feature
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.models import TinyModels, answer, families, greedy, hold_answers, prompt_tokens

by_family = pytest.mark.parametrize("family", families("dense", "window", "hybrid"))


@conforms(level="L5", gate="G7", clause=("10.3", "10.10"), negative=True)
@by_family
def test_requests_that_are_swapped_go_on(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    length = tiny.max_model_len - 24
    with tiny.open_swapping(family, enable_prefix_caching=False) as llm:
        outputs = answer(llm, [prompt_tokens(17, n) for n in range(6)], greedy(length))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    hold_answers(tiny.truth(family), record_gate, outputs, length)


@conforms(level="L5", gate="G7", clause=("10.3", "10.10"), claims=(Feature.PREFIX_CACHING,), negative=True)
@by_family
def test_prefixes_come_back_from_the_host(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    prompts = [prompt_tokens(2 * tiny.block_size + 1 + n, n) for n in range(6)]
    with tiny.open_swapping(family) as llm:
        outputs = [*answer(llm, prompts, greedy(40))]
        again = [answer(llm, [prompt], greedy(6))[0] for prompt in prompts]
    hold_answers(tiny.truth(family), record_gate, outputs, 40)
    hold_answers(tiny.truth(family), record_gate, again, 6)
    tiers = [output.cached_tokens_by_tier for output in again]
    if any("host" in tier for tier in tiers):
        assert any(tier["host"] for tier in tiers), "nothing came from the host"
