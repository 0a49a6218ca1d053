"""L5, speculation: tokens that are guessed and checked are those that would have come without, and so is the rest."""

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from zif import LLM, RequestOutput
from zif.errors import ConfigError
from zif_conformance.gates.result import Record
from zif_conformance.marks import conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.tiny_models.models import TinyModels, answer, families, greedy, prompt_tokens

# Of two tokens that are preferred to all others, many guesses are right, and not all.
_BIAS = {7: 9.0, 8: 9.0}
# More requests begin than can end.
_LATE_SHORTAGE = {"expected_output_percent": 0, "enable_prefix_caching": False}
_PROMPTS = [prompt_tokens(8, number) * 4 for number in range(4)]

by_family = pytest.mark.parametrize("family", families("dense", "window", "hybrid"))


@contextlib.contextmanager
def _guessing(tiny: TinyModels, family: str, max_draft: int = 3, is_cramped: bool = False) -> Iterator[LLM]:
    """Open the model with guesses; a runner that does not check guesses refuses them, and has to work without."""
    open_model, changes = (tiny.open_cramped, _LATE_SHORTAGE) if is_cramped else (tiny.open, {})
    try:
        opened = open_model(family, speculation="ngram", max_draft_tokens=max_draft, **changes)
    except ConfigError as error:
        if "verifies drafts" not in str(error):
            raise
        opened = open_model(family, **changes)
    with opened:
        yield opened


def _hold(tiny: TinyModels, record: Record, family: str, outputs: Sequence[RequestOutput]) -> None:
    for output in outputs:
        tiny.truth(family).hold_tokens(record, output.prompt_token_ids, output.outputs[0].token_ids, _BIAS)
    metrics = [output.metrics for output in outputs if output.metrics]
    assert all(0 <= each.num_accepted_tokens <= each.num_drafted_tokens for each in metrics)
    if any(each.num_drafted_tokens for each in metrics):
        assert any(each.num_accepted_tokens for each in metrics), "no guess was right"


@conforms(level="L5", gate="G7", clause="10.8")
@by_family
@pytest.mark.parametrize("max_draft", [1, 3, 6])
def test_guesses_change_no_token(tiny: TinyModels, record_gate: GateRecorder, family: str, max_draft: int) -> None:
    with _guessing(tiny, family, max_draft) as llm:
        outputs = answer(llm, _PROMPTS, greedy(24, logit_bias=_BIAS))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [24] * len(_PROMPTS)
    _hold(tiny, record_gate, family, outputs)


@conforms(level="L5", gate="G7", clause="10.8", negative=True)
@by_family
def test_guesses_survive_short_memory(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    with _guessing(tiny, family, is_cramped=True) as llm:
        outputs = answer(
            llm, [tokens[:16] for tokens in _PROMPTS] * 2, greedy(tiny.max_model_len - 24, logit_bias=_BIAS)
        )
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics), "memory was not short"
    _hold(tiny, record_gate, family, outputs)


@conforms(level="L5", gate="G7", clause="10.8", negative=True)
@by_family
def test_an_answer_ends_among_its_guesses(tiny: TinyModels, record_gate: GateRecorder, family: str) -> None:
    """One row may bring more tokens than the request may say: they and their log-probabilities are left out."""
    with _guessing(tiny, family) as llm:
        options = [greedy(length, logit_bias=_BIAS, logprobs=2) for length in (5, 6, 7, 8)]
        given = [{"prompt_token_ids": tokens} for tokens in _PROMPTS]
        outputs = llm.generate(given, options, use_tqdm=False)
        llm.engine.check_integrity()
    for output, length in zip(outputs, (5, 6, 7, 8), strict=True):
        sample = output.outputs[0]
        assert (len(sample.token_ids), len(sample.logprobs or ()), sample.finish_reason) == (length, length, "length")
    _hold(tiny, record_gate, family, outputs)
