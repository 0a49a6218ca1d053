"""Structured output end to end: whatever the model's numbers say, the answer has the form that was asked for."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from support.structured_forms import SCHEMAS
from zif import LLM, SamplingParams, StructuredOutput
from zif.contract import NO_TOKEN_LEFT
from zif.errors import RequestError
from zif.null.runner import NullRunner

MODEL = Path(__file__).resolve().parents[3] / "examples" / "embedded_model" / "checkpoint"
PROMPT = "def f(x):"
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 1024, "kv_bytes": 1 << 25}
PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["x", "y"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}
FORMS = [
    StructuredOutput(json=PERSON),
    StructuredOutput(regex="[ab]{3,9}"),
    StructuredOutput(choice=["yes", "no", "naïve"]),
    StructuredOutput(grammar='start: "x" start | "y"'),
]


@pytest.fixture(scope="module")
def null():
    with LLM(MODEL, platform="null", **SMALL) as llm:
        yield llm


def sampling(form, **options):
    return SamplingParams(**{"max_tokens": 400, "structured": form, "temperature": 1.0, **options})


def texts(llm, options, prompt=PROMPT):
    outputs = llm.generate([prompt] * len(options), options, use_tqdm=False)
    return [[(sample.text, sample.finish_reason) for sample in output.outputs] for output in outputs]


def check(form, text):
    """Assert that a whole answer has its form."""
    if form.json is not None:
        jsonschema.validate(json.loads(text), json.loads(form.text))
    elif form.regex is not None:
        assert re.fullmatch(form.regex, text)
    elif form.choice is not None:
        assert text in form.choice
    else:
        assert re.fullmatch("x*y", text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, prompt=st.sampled_from(["a", "def g():", "Return a list of", "1"]))
def test_any_answer_under_a_schema_validates_against_it(null, schema, prompt):
    ((answer,),) = texts(null, [sampling(StructuredOutput(json=schema))], prompt)
    assume(answer[1] != "length")
    assert answer[1] == "stop"
    jsonschema.validate(json.loads(answer[0]), schema)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    regex=st.sampled_from(
        [
            "[a-z]{1,20}",
            "(ab|cd)+e",
            r"\d{4}-\d\d-\d\d",
            "ü{2}|x?y",
            r"\w{1,5}\s\W",
            r"a\/b/[/]",
            "(a?b?){0,6}",
            r"[^\n]{5}\.",
        ]
    ),
    prompt=st.sampled_from(["a", "def g():", "Return a list of", "1"]),
)
def test_any_answer_under_a_regex_matches_it(null, regex, prompt):
    ((answer,),) = texts(null, [sampling(StructuredOutput(regex=regex))], prompt)
    assume(answer[1] != "length")
    assert re.fullmatch(regex, answer[0], re.ASCII)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
def test_an_answer_under_choices_is_one_of_them(null, choices):
    ((answer,),) = texts(null, [sampling(StructuredOutput(choice=choices))])
    assert answer[1] == "stop"
    assert answer[0] in choices


def test_any_json_object_is_one(null):
    for prompt in ("a", "b", "c", "d"):
        ((answer,),) = texts(null, [sampling(StructuredOutput(json_object=True), max_tokens=900)], prompt)
        if answer[1] == "stop":
            assert isinstance(json.loads(answer[0]), dict)
        else:
            assert answer[0].startswith("{")


def test_a_real_model_keeps_every_form_greedy_or_by_chance_with_and_without_guesses():
    options = [sampling(form, seed=7, n=2, max_tokens=120, temperature=t) for form in FORMS for t in (0.0, 1.0)]
    with LLM(MODEL, platform="cpu", **SMALL) as llm:
        plain = texts(llm, options)
    with LLM(MODEL, platform="cpu", **SMALL, speculation="ngram") as llm:
        outputs = llm.generate([PROMPT] * len(options), options, use_tqdm=False)
        guessed = [[(sample.text, sample.finish_reason) for sample in output.outputs] for output in outputs]
        assert sum(output.metrics.num_accepted_tokens for output in outputs) > 0
        assert sum(output.metrics.num_drafted_tokens - output.metrics.num_accepted_tokens for output in outputs) > 0
    assert guessed == plain
    for given_options, samples in zip(options, plain, strict=True):
        for text, reason in samples:
            if reason == "stop":
                check(given_options.structured, text)
    assert sum(reason == "stop" for samples in plain for _, reason in samples) >= len(options)


def test_samples_of_one_prompt_go_their_own_ways():
    with LLM(MODEL, platform="cpu", **SMALL) as llm:
        (samples,) = texts(llm, [sampling(FORMS[1], n=8, seed=1, max_tokens=40)])
    assert len(set(samples)) > 1
    for text, reason in samples:
        assert reason == "stop"
        check(FORMS[1], text)


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_answers_survive_preemption(null, speculation):
    form = StructuredOutput(regex="([a-z]{4} ){30}")
    prompts = [{"prompt_token_ids": [5 + i] * 20} for i in range(8)]
    options = SamplingParams(max_tokens=400, structured=form)
    expected = [output.outputs[0].text for output in null.generate(prompts, options, use_tqdm=False)]
    tight = {**SMALL, "kv_bytes": 8 * 16 * 20, "block_size": 16, "max_model_len": 200, "speculation": speculation}
    tight["expected_output_percent"] = 0
    with LLM(MODEL, platform="null", **tight) as llm:
        outputs = llm.generate(prompts, options, use_tqdm=False)
        llm.engine.check_integrity()
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert [output.outputs[0].text for output in outputs] == expected
    assert all(re.fullmatch(form.regex, text) for text in expected)


def test_requests_with_and_without_a_form_share_steps(null):
    free = SamplingParams(max_tokens=30)
    mixed = texts(null, [free, *(sampling(form) for form in FORMS), free])
    assert mixed[0] == mixed[-1] == texts(null, [free])[0]
    for form, ((text, reason),) in zip(FORMS, mixed[1:-1], strict=True):
        assert reason == "stop"
        check(form, text)


def test_an_answer_that_is_cut_is_a_beginning_of_its_form(null):
    ((whole,),) = texts(null, [sampling(FORMS[0])])
    ((cut,),) = texts(null, [sampling(FORMS[0], max_tokens=9)])
    assert cut[1] == "length"
    assert whole[0].startswith(cut[0])


@pytest.mark.parametrize("fields", [{"regex": "(a"}, {"regex": r"[^\s\S]"}, {"grammar": "start: nope"}])
def test_a_form_that_is_no_good_fails_its_request_only(null, fields):
    bad = sampling(StructuredOutput(**fields))
    with pytest.raises(RequestError, match="correct or simplify it"):
        null.generate(PROMPT, bad, use_tqdm=False)
    failed, *_ = null.generate(iter([PROMPT]), bad)
    assert failed.outputs[0].finish_reason == "error"
    assert "correct or simplify it" in (failed.outputs[0].error or "")
    assert texts(null, [sampling(FORMS[2])])[0][0][0] in ("yes", "no", "naïve")


@pytest.mark.parametrize("platform", ["null", "cpu"])
def test_a_form_that_fails_on_the_way_ends_its_request_only(platform, monkeypatch):
    monkeypatch.setattr("zif.structured.state.GRACE_S", 0.0)
    monkeypatch.setattr("zif.structured.state.TOKEN_S", 0.0)
    free = SamplingParams(max_tokens=8)
    with LLM(MODEL, platform=platform, **SMALL) as llm:
        bad, good = llm.generate([PROMPT, PROMPT], [sampling(FORMS[0]), free], use_tqdm=False)
        llm.engine.check_integrity()
    assert bad.outputs[0].finish_reason == "error"
    assert (bad.outputs[0].error or "").startswith(NO_TOKEN_LEFT)
    assert "to follow so far" in (bad.outputs[0].error or "")
    assert good.outputs[0].finish_reason in ("length", "stop")


def test_options_that_leave_the_form_no_token_are_a_fault_that_names_them():
    with LLM(MODEL, platform="cpu", **SMALL) as llm:
        (output,) = llm.generate(PROMPT, sampling(FORMS[2], allowed_token_ids=[5]), use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"
    assert (output.outputs[0].error or "").startswith(NO_TOKEN_LEFT)
    assert "structured" in (output.outputs[0].error or "")


@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_a_form_that_is_complete_ends_before_the_fewest_tokens_that_were_asked_for(speculation):
    options = [sampling(form, min_tokens=60, temperature=0.0) for form in (FORMS[2], StructuredOutput(regex="a{2}b*"))]
    with LLM(MODEL, platform="cpu", **SMALL, speculation=speculation) as llm:
        ((choice,), (repeated,)) = texts(llm, options)
    assert choice[0] in FORMS[2].choice
    assert choice[1] == "stop"
    # Where the form may go on, it does.
    assert re.fullmatch("aab{30,}", repeated[0])


def test_a_grammar_may_stand_in_place_of_any_form(null):
    other = 'start: "<" /[0-9]/ ">"'
    for form in FORMS:
        both = replace(form, or_grammar=other)
        answers = [texts(null, [sampling(both)], f"prompt {k}")[0][0] for k in range(12)]
        assert all(reason == "stop" for _, reason in answers)
        found = [text for text, _ in answers]
        others = [text for text in found if re.fullmatch("<[0-9]>", text)]
        assert 0 < len(others) < len(found)
        for text in set(found) - set(others):
            check(form, text)


def test_making_ready_early_changes_nothing_and_fails_nobody(null, tmp_path):
    null.engine.load_grammars()
    assert texts(null, [sampling(FORMS[3])])[0][0][1] == "stop"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(MODEL / name)
    with LLM(tmp_path, platform="null", **SMALL) as llm:
        llm.engine.load_grammars()
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate({"prompt_token_ids": [5]}, sampling(FORMS[0], detokenize=False), use_tqdm=False)


def test_a_runner_that_serves_no_forms_refuses_them(monkeypatch):
    monkeypatch.setattr(NullRunner, "attach_grammars", lambda self, grammars: False)
    with (
        LLM(MODEL, platform="null", **SMALL) as llm,
        pytest.raises(RequestError, match="not served by NullRunner"),
    ):
        llm.generate(PROMPT, sampling(FORMS[0]), use_tqdm=False)
