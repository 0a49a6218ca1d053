"""The tiny models of L4 and L5 can tell right from wrong: their choices are decided, and faults on purpose are seen."""

import pytest
import torch

from zif.contract import Capabilities, Feature, Numerics
from zif_conformance.subject import Subject
from zif_conformance.tiny_models.checkpoints import FAMILIES, SPOILT_ID, VOCAB_SIZE, spoil_token, write_checkpoint
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens
from zif_conformance.tiny_models.stepping import stepping
from zif_conformance.tiny_models.truth import Truth

_CLAIMS = Capabilities(
    dtypes=(Numerics("float32", "float32"),),
    features=frozenset(Feature),
    kv_dtypes=("float32",),
    block_sizes=(8,),
    max_head_size=512,
)


def _ignore(gate: str, error: float, limit: float, what: str = "") -> None:
    """Be a `Record` that does nothing."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: write_checkpoint(family, root / family, _CLAIMS) for family in FAMILIES}


@pytest.fixture(scope="module")
def truths(folders):
    return {family: Truth.of(folder, "float32") for family, folder in folders.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyModels(tmp_path_factory.mktemp("models"), Subject.find("reference"))


def _best(truth, prompt, length):
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            tokens.append(int(truth.exact_model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _num_decided(truth, length):
    measured = []
    prompt = prompt_tokens(30)
    truth.hold_tokens(lambda *entry: measured.append(entry), prompt, _best(truth, prompt, length))
    return int(measured[0][3].partition(" ")[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_choice_is_decided(truths, family):
    assert _num_decided(truths[family], 10) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_some_choices_are_decided_even_in_bfloat16(folders, family):
    assert _num_decided(Truth.of(folders[family], "bfloat16"), 20) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_tokens_fail(truths, family):
    prompt = prompt_tokens(30)
    right = _best(truths[family], prompt, 10)
    wrong = [(token + 1) % VOCAB_SIZE for token in right]
    with pytest.raises(AssertionError, match="G7"):
        truths[family].hold_tokens(_ignore, prompt, wrong)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["one token dropped", "two tokens swapped", "one token repeated"])
def test_tokens_of_a_disturbed_prompt_fail(truths, family, fault):
    truth, prompt = truths[family], prompt_tokens(30)
    disturbed = {
        "one token dropped": prompt[:20] + prompt[21:],
        "two tokens swapped": [*prompt[:20], prompt[21], prompt[20], *prompt[22:]],
        "one token repeated": [*prompt[:20], prompt[19], *prompt[20:]],
    }[fault]
    with pytest.raises(AssertionError, match="G7"):
        truth.hold_tokens(_ignore, prompt, _best(truth, disturbed, 20))


def test_no_answer_is_no_right_answer(truths):
    with pytest.raises(AssertionError, match="no token"):
        truths["dense"].hold_tokens(_ignore, prompt_tokens(5), [])


@pytest.mark.parametrize("family", ["dense", "window", "hybrid"])
def test_a_spoilt_token_is_not_a_number_and_no_other_is(tmp_path, family):
    folder = write_checkpoint(family, tmp_path, _CLAIMS)
    spoil_token(folder, SPOILT_ID, "float32")
    model = Truth.of(folder, "float32").declared_model
    clean = [token for token in prompt_tokens(20) if token != SPOILT_ID]
    with torch.inference_mode():
        assert model(torch.tensor([clean]), use_cache=False).logits.isfinite().all()
        # Rows before the token are not looked at: this attention multiplies what it masks by zero.
        logits = model(torch.tensor([[*clean[:6], SPOILT_ID, *clean[6:]]]), use_cache=False).logits[0, 6:]
    assert logits.isnan().all()


def test_a_platform_that_reads_a_wrong_block_is_caught(tiny):
    """Two requests whose tables are exchanged after the prompt go on from each other's KV."""
    with stepping(tiny.settings(tiny.folder("dense"))) as stepper:
        rows = [stepper.start(prompt_tokens(20, number)) for number in range(2)]
        stepper.advance(*rows, num_tokens=1)
        given = [row.tables for row in rows]
        for row in rows:
            stepper.release(row)
        for row, tables in zip(rows, reversed(given), strict=True):
            again = stepper.start(row.token_ids, num_prompt_tokens=20)
            again.num_computed = 20
            stepper._plan.started[-1].block_ids[0][:] = tables[0]
            stepper.advance(again, num_tokens=8)
            with pytest.raises(AssertionError, match="G7"):
                tiny.truth("dense").hold_tokens(_ignore, again.token_ids[:20], again.output)
            stepper.release(again)


def test_an_engine_that_answers_another_prompt_is_caught(tiny):
    with tiny.open("dense") as llm:
        outputs = answer(llm, [prompt_tokens(20), prompt_tokens(20, 1)], greedy(8))
    hold_answers(tiny.truth("dense"), _ignore, outputs, 8)
    outputs[0].outputs, outputs[1].outputs = outputs[1].outputs, outputs[0].outputs
    with pytest.raises(AssertionError, match="G7"):
        hold_answers(tiny.truth("dense"), _ignore, outputs, 8)
