"""The offline interface over the null platform: every token is known in advance, so every answer can be checked."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from zif import LLM, SamplingParams
from zif.contract import StepFuture, StepPlan
from zif.errors import CheckpointError, EngineError, RequestError
from zif.null.platform import NullDevice
from zif.null.runner import NullRunner, expected_token
from zif.text.tokenizer import load_tokenizer

PROMPT = [10, 11, 12, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("gemma2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, platform="null", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16) as llm:
        yield llm
        llm.engine.check_integrity()


def tokens(*prompt: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(prompt or PROMPT)}


def sampling(**options: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **options})  # type: ignore[arg-type]


def continuation(llm: LLM, prompt: list[int], length: int) -> list[int]:
    known = list(prompt)
    for _ in range(length):
        known.append(expected_token(known, llm.model.kv_specs, llm.model.vocab_size))
    return known[len(prompt) :]


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[*PROMPT[: 1 + i % 7], 20 + i] for i in range(23)]
    outputs = llm.generate([tokens(*p) for p in prompts], sampling(), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [continuation(llm, p, 6) for p in prompts]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert [o.prompt_token_ids for o in outputs] == prompts


def test_text_prompt_is_encoded_and_decoded(llm: LLM, model: Path) -> None:
    output = llm.generate("hello", sampling(), use_tqdm=False)[0]
    tokenizer = load_tokenizer(model)
    assert output.prompt == "hello"
    assert output.prompt_token_ids == tokenizer.encode("hello")
    whole = tokenizer.decode(output.prompt_token_ids + output.outputs[0].token_ids)
    assert whole == tokenizer.decode(output.prompt_token_ids) + output.outputs[0].text


def test_iterator_in_iterator_out_pulls_only_what_it_needs(llm: LLM) -> None:
    pulled = []

    def prompts() -> Iterator[dict[str, list[int]]]:
        for i in range(500):
            pulled.append(i)
            yield tokens(5, 6, 7 + i % 90)

    outputs = llm.generate(prompts(), sampling())
    first = next(outputs)
    assert first.outputs[0].token_ids == continuation(llm, [5, 6, 7], 6)
    assert len(pulled) <= 16 * 4
    rest = list(outputs)
    assert len(rest) == 499
    assert rest[-1].outputs[0].token_ids == continuation(llm, [5, 6, 7 + 499 % 90], 6)


def test_iterator_reports_a_wrong_prompt_in_its_place(llm: LLM) -> None:
    outputs = list(llm.generate(iter([tokens(), tokens(*range(5, 90)), tokens()]), sampling()))
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert "85 tokens" in (outputs[1].outputs[0].error or "")


def test_closing_the_iterator_aborts_what_runs(llm: LLM) -> None:
    outputs = llm.generate(iter([tokens(i + 5) for i in range(9)]), sampling())
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert not llm.engine.check_integrity()
    assert llm.generate(tokens(), sampling(), use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": list(range(5, 85))}, r"80 tokens and the context is 64"),
        ({"prompt_token_ids": [5, -1]}, r"holds -1"),
        ({"prompt_token_ids": [5, 10**6]}, r"holds 1000000"),
        ({"prompt_token_ids": [5, "6"]}, r"no integer token id"),
        ({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data"),
        ({}, "neither"),
        (7, "type int"),
        ({"prompt_token_ids": 5}, "prompt_token_ids of type int"),
        ({"prompt_token_ids": None}, "prompt_token_ids of type NoneType"),
        ({"prompt_token_ids": b"ab"}, "prompt_token_ids of type bytes"),
        ({"prompt_token_ids": [5], "prompt": 7}, "prompt=7 must be text"),
        ({"prompt_token_ids": [5], "cache_salt": 7}, "cache_salt=7 must be text"),
        ({"prompt_token_ids": [5], "cache_salt": "\ud800"}, "cache_salt holds"),
        ("a\ud800", "no character"),
    ],
)
def test_wrong_prompt_is_refused_before_anything_runs(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([tokens(), prompt], sampling(), use_tqdm=False)  # type: ignore[list-item]
    assert not llm.engine.has_work()


@pytest.mark.parametrize("options", [{"allowed_token_ids": [10**6]}, {"logit_bias": {10**6: 1.0}}])
def test_options_that_name_foreign_tokens_are_refused(llm: LLM, options: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        llm.generate(tokens(), sampling(**options), use_tqdm=False)


def test_options_that_are_no_sampling_params_are_refused(llm: LLM) -> None:
    for options in ({"temperature": 0}, [{"temperature": 0}]):
        with pytest.raises(RequestError, match="SamplingParams"):
            llm.generate([tokens()], options, use_tqdm=False)  # type: ignore[call-overload]


@pytest.mark.parametrize(("priority", "message"), [(3, "scheduling_policy='priority'"), ("high", "must be an integer")])
def test_priority_that_would_be_ignored_is_refused(llm: LLM, priority: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([tokens()], sampling(), priority=[priority], use_tqdm=False)  # type: ignore[list-item]
    with pytest.raises(RequestError, match=message):
        llm.stream(tokens(), sampling(), priority=priority)  # type: ignore[arg-type]


def test_numbers_of_prompts_and_options_must_match(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 SamplingParams for 1"):
        llm.generate([tokens()], [sampling(), sampling()], use_tqdm=False)
    with pytest.raises(RequestError, match="2 priorities for 1"):
        llm.generate([tokens()], sampling(), priority=[1, 2], use_tqdm=False)


def test_parallel_samples_share_the_prompt_and_are_separate_outputs(llm: LLM) -> None:
    output = llm.generate(tokens(*range(5, 45)), sampling(n=5), use_tqdm=False)[0]
    assert [o.index for o in output.outputs] == list(range(5))
    # The null platform knows no seed, so the samples agree: with the oracle, and thus with each other.
    assert all(o.token_ids == continuation(llm, list(range(5, 45)), 6) for o in output.outputs)


def test_stop_token_ends_the_sample_and_is_reported(llm: LLM) -> None:
    expected = continuation(llm, PROMPT, 6)
    stop = next(token for i, token in enumerate(expected) if i >= 2 and token not in expected[:i])
    output = llm.generate(tokens(), sampling(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_stop_string_cuts_the_text_and_frees_the_request(llm: LLM) -> None:
    plain = llm.generate(tokens(), sampling(max_tokens=20), use_tqdm=False)[0].outputs[0]
    stop = plain.text[6:8]
    cut = llm.generate(tokens(), sampling(max_tokens=20, stop=stop), use_tqdm=False)[0].outputs[0]
    kept = llm.generate(tokens(), sampling(max_tokens=20, stop=stop, include_stop_str_in_output=True), use_tqdm=False)[
        0
    ].outputs[0]
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert kept.text == cut.text + stop
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.token_ids) < 20


def test_stop_string_in_the_last_token_allowed_is_a_stop(llm: LLM) -> None:
    plain = llm.generate(tokens(), sampling(max_tokens=20), use_tqdm=False)[0].outputs[0]
    stop = plain.text[6:8]
    cut = llm.generate(tokens(), sampling(max_tokens=20, stop=stop), use_tqdm=False)[0].outputs[0]
    last = llm.generate(tokens(), sampling(max_tokens=len(cut.token_ids), stop=stop), use_tqdm=False)[0].outputs[0]
    assert last == cut


def test_without_detokenize_there_is_no_text(llm: LLM) -> None:
    output = llm.generate(tokens(), sampling(detokenize=False), use_tqdm=False)[0].outputs[0]
    assert output.text == ""
    assert len(output.token_ids) == 6


def test_stream_grows_and_ends_like_generate(llm: LLM) -> None:
    texts = [output.outputs[0].text for output in llm.stream(tokens(), sampling(max_tokens=9))]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == llm.generate(tokens(), sampling(max_tokens=9), use_tqdm=False)[0].outputs[0].text


def test_abandoned_stream_is_aborted(llm: LLM) -> None:
    stream = llm.stream(tokens(), sampling(max_tokens=30))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    while llm.engine.has_work():
        llm.engine.step()
    assert not llm.engine.check_integrity()


def test_stream_that_is_never_read_leaves_nothing(llm: LLM) -> None:
    llm.stream(tokens(), sampling())
    assert not llm.engine.has_work()


def test_streams_side_by_side_both_reach_their_end(llm: LLM) -> None:
    short, long = llm.stream(tokens(5), sampling(max_tokens=3)), llm.stream(tokens(6), sampling(max_tokens=9))
    first = next(short)
    last_long, last_short = list(long)[-1], list(short)[-1]
    assert len(first.outputs[0].token_ids) == 1
    assert last_long.outputs[0].token_ids == continuation(llm, [6], 9)
    assert last_short.outputs[0].token_ids == continuation(llm, [5], 3)
    assert (last_long.finished, last_short.finished) == (True, True)


def test_second_identical_prompt_is_found_computed_unless_salted(llm: LLM) -> None:
    prompt = tokens(*range(5, 45))
    cold, warm = (llm.generate(prompt, sampling(), use_tqdm=False)[0] for _ in range(2))
    salted = llm.generate({**prompt, "cache_salt": "tenant"}, sampling(), use_tqdm=False)[0]
    llm.reset_prefix_cache()
    again = llm.generate(prompt, sampling(), use_tqdm=False)[0]
    assert [o.num_cached_tokens for o in (cold, warm, salted, again)] == [0, 32, 0, 0]
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids == salted.outputs[0].token_ids


def test_interrupt_returns_what_was_generated(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = llm.engine.step, iter(range(1000))

    def interrupted_step() -> object:
        if next(count) == 9:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    outputs = llm.generate([tokens(5 + i) for i in range(12)], sampling(), use_tqdm=False)
    reasons = [o.outputs[0].finish_reason for o in outputs]
    assert set(reasons) == {"length", "abort"}
    for i, output in enumerate(outputs):
        generated = output.outputs[0].token_ids
        assert generated == continuation(llm, [5 + i], len(generated))
    monkeypatch.undo()
    assert llm.generate(tokens(), sampling(), use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_second_interrupt_raises(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_step() -> object:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second interrupt was swallowed")

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(tokens(), sampling(), use_tqdm=False)
    monkeypatch.undo()


def interrupt_within_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, count = NullRunner.submit, itertools.count()

    def interrupted_submit(self: NullRunner, step: StepPlan) -> StepFuture:
        if next(count) == number:
            signal.raise_signal(signal.SIGINT)
        return submit(self, step)

    monkeypatch.setattr(NullRunner, "submit", interrupted_submit)


def test_interrupted_stream_leaves_the_engine_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_within_step(3, monkeypatch)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen += [None for _ in llm.stream(tokens(), sampling(max_tokens=20))]
    monkeypatch.undo()
    assert llm.generate(tokens(), sampling(), use_tqdm=False)[0].outputs[0].token_ids == continuation(llm, PROMPT, 6)


def test_interrupted_iterator_yields_what_it_holds_first(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_within_step(9, monkeypatch)
    outputs = []
    with pytest.raises(KeyboardInterrupt):
        outputs.extend(llm.generate((tokens(5 + i) for i in range(100)), sampling()))
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert set(reasons) == {"length", "abort"}
    assert all(o.outputs[0].token_ids == continuation(llm, [5 + i], 6) for i, o in enumerate(outputs[:4]))
    monkeypatch.undo()
    assert llm.generate(tokens(), sampling(), use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_iterator_reports_a_prompt_that_is_none_and_goes_on(llm: LLM) -> None:
    outputs = list(llm.generate(iter([tokens(), None, tokens()]), sampling()))  # type: ignore[list-item]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length"]


def test_fault_of_one_request_stays_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = NullRunner.submit

    def faulty_submit(self: NullRunner, step: StepPlan) -> StepFuture:
        future = submit(self, step)
        if 1 in step.request_ids and step.samples[step.request_ids.index(1)]:
            future.result().faults[1] = "not a number"
        return future

    monkeypatch.setattr(NullRunner, "submit", faulty_submit)
    outputs = llm.generate([tokens(5), tokens(6), tokens(7)], sampling(), use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert outputs[1].outputs[0].error == "not a number"
    assert outputs[2].outputs[0].token_ids == continuation(llm, [7], 6)


def test_failed_step_ends_the_engine_with_its_reason(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_submit(self: NullRunner, step: StepPlan) -> StepFuture:
        raise RuntimeError("device lost")

    submit, steps = NullRunner.submit, iter(range(100))

    def late_failure(self: NullRunner, step: StepPlan) -> StepFuture:
        return submit(self, step) if next(steps) < 4 else broken_submit(self, step)

    monkeypatch.setattr(NullRunner, "submit", late_failure)
    with pytest.raises(EngineError, match="device lost") as failure:
        llm.generate([tokens(), tokens(5)], [sampling(max_tokens=2), sampling(max_tokens=30)], use_tqdm=False)
    finished, cut = (output.outputs[0] for output in failure.value.outputs)
    assert (finished.finish_reason, finished.token_ids) == ("length", continuation(llm, PROMPT, 2))
    assert (cut.finish_reason, cut.token_ids) == (None, continuation(llm, [5], 4))
    with pytest.raises(EngineError, match="device lost"):
        llm.generate(tokens(), sampling(), use_tqdm=False)


def test_closed_engine_says_so(model: Path) -> None:
    llm = LLM(model, platform="null", max_model_len=64)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate(tokens(), sampling(), use_tqdm=False)


def test_model_without_tokenizer_serves_tokens_only(tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with LLM(folder, platform="null", max_model_len=64) as llm:
        output = llm.generate(tokens(), sampling(detokenize=False), use_tqdm=False)[0]
        assert output.outputs[0].token_ids == continuation(llm, PROMPT, 6)
        for prompt, options in (("text", sampling()), (tokens(), sampling())):
            with pytest.raises(RequestError, match="tokenizer"):
                llm.generate(prompt, options, use_tqdm=False)


def test_defaults_come_from_the_generation_config(model: Path, tmp_path: Path) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7, "max_new_tokens": 3}')
    with LLM(folder, platform="null", max_model_len=64) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=7, max_tokens=3)
        assert len(llm.generate(tokens(), use_tqdm=False)[0].outputs[0].token_ids) <= 3


@pytest.mark.parametrize("declared", ['"x"', "[[1]]", "1.5"])
def test_end_of_sequence_that_is_no_token_id_is_named_and_the_device_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str
) -> None:
    folder = build_checkpoint("llama3", tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {declared}}}')
    closed: list[NullDevice] = []
    monkeypatch.setattr(NullDevice, "close", lambda device: closed.append(device))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        LLM(folder, platform="null", max_model_len=64)
    assert len(closed) == 1


def test_priorities_decide_who_runs_first(model: Path) -> None:
    options = {"max_num_seqs": 1, "max_model_len": 64, "scheduling_policy": "priority"}
    with LLM(model, platform="null", **options) as llm:
        late, early = llm.generate([tokens(5), tokens(6)], sampling(), priority=[5, -5], use_tqdm=False)
    assert late.metrics is not None
    assert early.metrics is not None
    assert early.metrics.finished_s <= late.metrics.first_token_s


def test_importing_the_engine_and_planning_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; from zif import LLM, SamplingParams\n"
        f"with LLM({str(model)!r}, platform='null', max_model_len=64) as llm:\n"
        "    llm.generate('hi', SamplingParams(max_tokens=3), use_tqdm=False)\n"
        "assert 'torch' not in sys.modules, 'torch'; assert 'transformers' not in sys.modules, 'transformers'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
