"""L3: what the bank of mutants showed to be missing: soft caps so small that a wrong order of cap and mask shows."""

from dataclasses import replace
from typing import Any

import pytest

from zif.contract import Capabilities, Device, Feature
from zif_conformance.gates import hold, ratio
from zif_conformance.marks import cases, conforms
from zif_conformance.oracle.attention_cases import fitted
from zif_conformance.oracle.paged import PagedStep
from zif_conformance.oracle.sequences import AttentionCase, Sequences

CHUNKS = ((1, 1), (5, 5), (1, 40), (16, 48), (7, 33), (33, 70), (2, 18))


@conforms(
    level="L3", gate="G3", clause="8.3", negative=True, claims=(Feature.ATTENTION_FULL, Feature.ATTENTION_SOFTCAP)
)
@pytest.mark.parametrize("dtype", cases("dtype", "float32", "bfloat16", "float16"))
@pytest.mark.parametrize("softcap", [0.5, 2.0, 30.0])
def test_small_soft_caps(
    device: Device, capabilities: Capabilities, dtype: str, softcap: float, record_gate: Any
) -> None:
    """A hidden key that is capped after it was masked has a score of minus the cap: near all others."""
    case = replace(fitted(AttentionCase(CHUNKS, dtype=dtype), capabilities), softcap=softcap)
    sequences = Sequences.random(case)
    with PagedStep(device, sequences) as step:
        got = step.run()
    declared = [run.flatten(1) for run in sequences.declared()]
    hold(record_gate, ratio(got.flatten(1), sequences.exact().flatten(1), declared, f"soft cap {softcap}"))
