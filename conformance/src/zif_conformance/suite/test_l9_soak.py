"""L9: traffic for as long as ZIF_CONFORMANCE_SOAK_S says (60 s by default), after which nothing may have grown."""

import os
import random
import time

import pytest

from zif.contract import Feature
from zif_conformance.failing import FailingDevices
from zif_conformance.marks import Safety, conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.subject import Subject
from zif_conformance.tiny_models.models import MAX_MODEL_LEN, TinyModels, answer, families, greedy, prompt_tokens

VARIABLE = "ZIF_CONFORMANCE_SOAK_S"
A_WEEK_S = 7 * 86_400.0
ROUND = 12


def ignored(gate: str, error: float, limit: float, what: str = "") -> None:
    """Record nothing."""


@conforms(
    level="L9",
    gate="G7",
    clause=("6.3", "10.3", "10.6"),
    claims=(Feature.PREFIX_CACHING,),
    negative=True,
    safety=Safety.MEMORY,
    deadline_s=A_WEEK_S,
)
@pytest.mark.parametrize("family", families("dense", "window", "hybrid"))
def test_nothing_grows_under_traffic(
    tiny: TinyModels, subject: Subject, monkeypatch: pytest.MonkeyPatch, record_gate: GateRecorder, family: str
) -> None:
    """Rounds of mixed requests in short memory; at each round's end the same bytes are lent, and answers are right."""
    devices, chance = FailingDevices(subject, monkeypatch), random.Random(family)
    ends_s = time.monotonic() + float(os.environ.get(VARIABLE, "60")) / 3
    num_rounds = 0
    with tiny.open_cramped(family) as llm:
        lent = devices.allocated_bytes()
        while time.monotonic() < ends_s or not num_rounds:
            prompts = [prompt_tokens(chance.randrange(1, 40), chance.randrange(20)) for _ in range(ROUND)]
            length = chance.randrange(1, MAX_MODEL_LEN - 40)
            stream = llm.stream({"prompt_token_ids": prompts[0]}, greedy(length))
            next(stream)
            del stream
            outputs = answer(llm, prompts, greedy(length))
            assert devices.allocated_bytes() == lent, f"memory grew in round {num_rounds}"
            checked = chance.randrange(ROUND)
            sample = outputs[checked].outputs[0]
            # Recorded once only: what is recorded is kept, and hours of it would grow.
            record = ignored if num_rounds else record_gate
            tiny.truth(family).hold_tokens(record, prompts[checked], sample.token_ids)
            num_rounds += 1
    assert devices.allocated_bytes() == 0
