"""Steps that raise, on the null platform: the request that makes them raise ends, the others get their text.

What is poison is found by its first token, since a request that starts over is told to the runner anew.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.checkpoints import build_checkpoint
from support.control_plane import new_request
from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.contract import StepFuture, StepPlan
from zif.engine.generation import Generation
from zif.errors import DeviceLostError, EngineError
from zif.null.runner import NullRunner, expected_token

LENGTH = 5
CAUSE = "computing this request raised ValueError; the log of the engine has the cause"
MAX_STEPS = 2000


class FaultyDevice:
    """Let the null runner raise when it computes a request whose prompt begins with `poison`, past `after` tokens.

    `error` is raised; `late` lets the step be submitted, and its result raise. `num_raised` counts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, poison: int, *, after: int = 0, late: bool = False) -> None:
        self.num_raised = 0
        self.error: Exception = ValueError("the kernel of /secret/path met a value that it cannot hold")
        self._poison, self._after, self._late = poison, after, late
        self._first_tokens: dict[int, int] = {}
        submit = NullRunner.submit
        monkeypatch.setattr(NullRunner, "submit", lambda runner, step: self._submit(submit, runner, step))

    def result(self) -> object:
        raise self.error

    def _submit(
        self, submit: Callable[[NullRunner, StepPlan], StepFuture], runner: NullRunner, step: StepPlan
    ) -> StepFuture:
        self._first_tokens.update({start.request_id: start.token_ids[0] for start in step.started})
        rows = zip(step.request_ids, step.num_computed, step.num_tokens, strict=True)
        if not any(self._first_tokens[r] == self._poison and c + n > self._after for r, c, n in rows):
            return submit(runner, step)
        self.num_raised += 1
        if not self._late:
            raise self.error
        submit(runner, step)
        return self  # type: ignore[return-value]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("gemma2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, platform="null", max_model_len=64, max_num_seqs=8, max_num_batched_tokens=48) as opened:
        opened.engine.outlive_failed_steps()
        yield opened
        opened.engine.check_integrity()


def begin(llm: LLM, prompts: list[list[int]], **options: object) -> list[Generation]:
    sampling = SamplingParams(**{"max_tokens": LENGTH, "ignore_eos": True, **options})  # type: ignore[arg-type]
    engine = llm.engine
    return [engine.submit(engine.check({"prompt_token_ids": prompt}, sampling), sampling) for prompt in prompts]


def finish(llm: LLM) -> None:
    for _ in range(MAX_STEPS):
        if not llm.engine.has_work():
            return
        llm.engine.step()
    pytest.fail(f"the engine has work after {MAX_STEPS} steps")


def continuation(llm: LLM, prompt: list[int]) -> list[int]:
    known = list(prompt)
    for _ in range(LENGTH):
        known.append(expected_token(known, llm.model.kv_specs, llm.model.vocab_size))
    return known[len(prompt) :]


def hold(llm: LLM, generations: list[Generation], poison: int) -> None:
    """Assert that exactly the poisonous prompts failed, and that the others got their text."""
    for generation in generations:
        output = llm.engine.output(generation).outputs[0]
        if generation.prompt.token_ids[0] == poison:
            assert (output.finish_reason, output.error) == ("error", CAUSE)
        else:
            assert output.token_ids == continuation(llm, generation.prompt.token_ids), generation.prompt
            assert output.finish_reason == "length"


def fail_next(monkeypatch: pytest.MonkeyPatch, fits: Callable[[StepPlan], bool] = lambda step: True) -> list[int]:
    """Let the next step that computes something and `fits` raise before anything else. Returns its number, once it did.

    One that is under way behind it raises too: the runner was never told of the requests.
    """
    submit, raised = NullRunner.submit, list[int]()

    def once(runner: NullRunner, step: StepPlan) -> StepFuture:
        if step.request_ids and not raised and fits(step):
            raised.append(step.step)
            raise ValueError("a bit fell over")
        return submit(runner, step)

    monkeypatch.setattr(NullRunner, "submit", once)
    return raised


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("after", [0, 9, 12])
@pytest.mark.parametrize("num_prompts", [1, 2, 7, 30])
def test_only_the_request_that_makes_steps_raise_fails(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, num_prompts: int, after: int, late: bool
) -> None:
    device = FaultyDevice(monkeypatch, poison=99, after=after, late=late)
    chance = random.Random(num_prompts + after)
    prompts = [[20 + i, *(chance.randrange(90) for _ in range(9))] for i in range(num_prompts)]
    prompts[chance.randrange(num_prompts)][0] = 99
    generations = begin(llm, prompts)
    finish(llm)
    hold(llm, generations, poison=99)
    # Two steps are under way at a time, and both raise: once with everyone, then with a half, a quarter, and alone.
    assert device.num_raised <= 2 * 5, "the cause is found by halves, not by trying everyone"


def test_several_that_share_a_prefix_are_told_apart(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix, chunked prompts, parallel samples, and arrivals while the cause is sought."""
    FaultyDevice(monkeypatch, poison=99, after=4)
    shared = [7] * 33
    generations = begin(llm, [[*shared, 1], [99, 2], [*shared, 3], [4, 5], [99, 6], [*shared, 8]])
    siblings = begin(llm, [[9, *shared]], n=3)
    for arriving in range(6):
        llm.engine.step()
        generations += begin(llm, [[30 + arriving, *shared]])
    finish(llm)
    hold(llm, generations, poison=99)
    answers = llm.engine.output(siblings[0]).outputs
    assert [answer.token_ids for answer in answers] == [continuation(llm, [9, *shared])] * 3


def test_a_cause_that_is_given_up_while_it_is_sought_blames_nobody(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FaultyDevice(monkeypatch, poison=99)
    generations = begin(llm, [[i, 1, 2] for i in range(20, 24)] + [[99, 1]])
    while not device.num_raised:
        llm.engine.step()
    llm.engine.abort(generations.pop())
    finish(llm)
    hold(llm, generations, poison=99)


def test_a_step_that_raises_once_is_nobodys_fault(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, steps = NullRunner.submit, iter(range(1000))

    def once(runner: NullRunner, step: StepPlan) -> StepFuture:
        if next(steps) == 3:
            raise ValueError("a bit fell over")
        return submit(runner, step)

    monkeypatch.setattr(NullRunner, "submit", once)
    generations = begin(llm, [[i, 1, 2] for i in range(20, 30)])
    finish(llm)
    hold(llm, generations, poison=99)


def test_a_step_that_raises_once_says_nothing_of_memory(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What admission has learned stays, and nobody counts as preempted."""
    admission = llm.engine._scheduler._requests.admission  # type: ignore[attr-defined]
    generations = begin(llm, [[i, 1, 2] for i in range(20, 28)])
    llm.engine.step()
    yet_to_come = new_request(900, [1], max_total_tokens=1001)
    before = admission.num_expected(yet_to_come)
    fail_next(monkeypatch)
    while not any(generation.samples[0].request.num_recoveries for generation in generations):
        llm.engine.step()
    assert admission.num_expected(yet_to_come) == before
    finish(llm)
    hold(llm, generations, poison=99)
    metrics = [llm.engine.output(generation).metrics for generation in generations]
    assert [m and (m.num_preemptions, m.num_recoveries) for m in metrics] == [(0, 1)] * len(generations)


def test_room_in_host_memory_is_made_though_the_step_that_should_make_it_raised(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises before any copy. The index counts on what its drops give back, in the store as well."""
    chance = random.Random(0)
    with LLM(model, platform="null", max_model_len=48, max_num_seqs=4, kv_bytes=4096, host_kv_bytes=1024) as llm:
        llm.engine.outlive_failed_steps()
        raised = fail_next(
            monkeypatch, lambda step: len(step.request_ids) > 1 and bool(step.transfers and step.transfers.drops)
        )
        generations = []
        for _ in range(20):
            generations += begin(llm, [[chance.randrange(20, 90)] * 40 for _ in range(4)])
            finish(llm)
            llm.engine.check_integrity()
        assert raised
        hold(llm, generations, poison=99)


def test_text_that_was_held_back_is_shown_when_its_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(MODEL, platform="null", max_model_len=64, max_num_seqs=4) as llm:
        engine, prompt = llm.engine, {"prompt_token_ids": [99, 10, 11]}
        engine.outlive_failed_steps()
        sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
        said = llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0].text
        waiting = SamplingParams(max_tokens=50, ignore_eos=True, stop=[f"{said}\0"])
        FaultyDevice(monkeypatch, poison=99, after=3 + LENGTH - 1)
        generation = engine.submit(engine.check(prompt, waiting), waiting)
        finish(llm)
        output = engine.output(generation).outputs[0]
        assert (output.text, output.error) == (said, CAUSE)


def test_an_engine_whose_steps_all_raise_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FaultyDevice(monkeypatch, poison=99)
    begin(llm, [[99, i] for i in range(8)])
    with pytest.raises(ValueError, match="cannot hold"):
        finish(llm)
    assert device.num_raised <= 2 * 8


def test_batches_that_raise_though_nobody_does_alone_end_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = NullRunner.submit

    def crowded(runner: NullRunner, step: StepPlan) -> StepFuture:
        if len(step.request_ids) > 3:
            raise ValueError("no memory for so many")
        return submit(runner, step)

    monkeypatch.setattr(NullRunner, "submit", crowded)
    begin(llm, [[20 + i, *range(12)] for i in range(8)], max_tokens=50)
    with pytest.raises(ValueError, match="so many"):
        finish(llm)


def test_a_lost_device_is_never_outlived(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    device = FaultyDevice(monkeypatch, poison=99)
    device.error = DeviceLostError("the device fell off the bus")
    begin(llm, [[99, 1]])
    with pytest.raises(DeviceLostError):
        finish(llm)
    with pytest.raises(EngineError, match="fell off"):
        llm.engine.step()
