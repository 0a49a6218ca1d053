"""L7: whatever fails in a device, an error comes in time, nothing is kept, and a new engine answers rightly."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import pytest

from zif import LLM
from zif.contract import Capabilities, Feature
from zif.errors import EngineError, OutOfMemoryError, ZifError
from zif_conformance.claims import INJECTION
from zif_conformance.failing import FailingDevices, injector_variable
from zif_conformance.marks import Safety, conforms
from zif_conformance.proof import GateRecorder
from zif_conformance.subject import Subject
from zif_conformance.tiny_models.models import TinyModels, answer, greedy, hold_answers, prompt_tokens

FULL = (Feature.ATTENTION_FULL,)
SOON_S = 20.0
"""An error that takes longer than this is a hang, on any machine."""
START_S = 90.0

_ENDLESS = """
import sys
from zif import LLM, SamplingParams
from zif_conformance.tiny_models.models import greedy, prompt_tokens
settings = eval(sys.argv[1])
print("loading", flush=True)
llm = LLM(**settings)
while True:
    print("generating", flush=True)
    llm.generate([{"prompt_token_ids": prompt_tokens(20, n)} for n in range(4)], greedy(40), use_tqdm=False)
"""


@pytest.fixture
def failing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> FailingDevices:
    """Devices that fail when told to."""
    return FailingDevices(subject, monkeypatch)


def _serves(tiny: TinyModels, record: GateRecorder, number: int) -> None:
    """Assert that a new engine answers rightly."""
    with tiny.open("dense") as llm:
        hold_answers(tiny.truth("dense"), record, answer(llm, [prompt_tokens(19, number)], greedy(6)), 6)


def _fails_soon(llm: LLM, number: int) -> None:
    """Assert that generating ends soon, with an error that says something, and that the engine says so again."""
    prompts = [{"prompt_token_ids": prompt_tokens(17, number + n)} for n in range(3)]
    began_s = time.monotonic()
    with pytest.raises(EngineError) as caught:
        llm.generate(prompts, greedy(30), use_tqdm=False)
    assert time.monotonic() - began_s < SOON_S
    assert str(caught.value), "the error says nothing"
    with pytest.raises(EngineError):
        llm.generate(prompts, greedy(1), use_tqdm=False)


@conforms(level="L7", gate="G7", clause=("6.2", "6.3", "6.4"), negative=True, claims=FULL, safety=Safety.MEMORY)
@pytest.mark.parametrize("number", range(1, 13))
def test_an_allocation_fails_while_an_engine_starts(
    tiny: TinyModels, failing: FailingDevices, record_gate: GateRecorder, number: int
) -> None:
    """The engine does not start and keeps nothing; one that needs fewer allocations is not concerned."""
    failing.fail("allocator", "allocate", number, lambda: OutOfMemoryError("no memory, on purpose"))
    try:
        with tiny.open("dense") as llm:
            assert failing.num_calls < number, "a failed allocation was not noticed"
            hold_answers(tiny.truth("dense"), record_gate, answer(llm, [prompt_tokens(19)], greedy(6)), 6)
    except OutOfMemoryError:
        assert failing.num_calls == number
    failing.heal()
    assert failing.allocated_bytes() == 0, "memory of an engine that did not start is still lent"
    _serves(tiny, record_gate, number)


@conforms(level="L7", gate="G7", clause=("5.1", "6.3", "10.4"), negative=True, claims=FULL, safety=Safety.MEMORY)
@pytest.mark.parametrize("number", [1, 2, 6, 23])
@pytest.mark.parametrize(
    ("service", "method"),
    [("attention", "prepare"), ("attention", "write"), ("attention", "attend"), ("ops", "linear"), ("ops", "rms_norm")],
)
def test_a_call_fails_while_an_engine_generates(
    tiny: TinyModels, failing: FailingDevices, record_gate: GateRecorder, service: str, method: str, number: int
) -> None:
    failing.fail(service, method, number, lambda: RuntimeError("a kernel failed, on purpose"))
    with tiny.open("dense") as llm:
        if failing.num_calls < number:
            _fails_soon(llm, number)
    failing.heal()
    assert failing.allocated_bytes() == 0, "memory of a failed engine is still lent after it was closed"
    _serves(tiny, record_gate, number)


@conforms(level="L7", gate="G7", clause=("5.1", "6.4"), negative=True, claims=FULL, deadline_s=240)
@pytest.mark.parametrize("moment", ["loading", "generating"])
def test_a_process_that_is_killed_leaves_the_device_usable(
    tiny: TinyModels, record_gate: GateRecorder, moment: str
) -> None:
    settings = repr(tiny.settings(tiny.folder("dense")))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, settings],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                if line.strip() == moment:
                    break
            else:
                pytest.fail(f"the engine ended by itself: {process.stderr.read()[-1000:]}")
        finally:
            process.send_signal(signal.SIGKILL)
    began_s = time.monotonic()
    _serves(tiny, record_gate, 3)
    assert time.monotonic() - began_s < START_S


@conforms(level="L7", gate="G7", clause=("6.2", "6.3"), negative=True, claims=(*FULL, INJECTION), safety=Safety.MEMORY)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_device_itself_has_no_memory(
    tiny: TinyModels,
    capabilities: Capabilities,
    monkeypatch: pytest.MonkeyPatch,
    record_gate: GateRecorder,
    number: int,
) -> None:
    monkeypatch.setenv(injector_variable(capabilities), f"allocation={number}")
    try:
        tiny.open("dense").close()
    except OutOfMemoryError:
        pass
    else:
        assert number > 1, "no allocation failed"
    monkeypatch.delenv(injector_variable(capabilities))
    _serves(tiny, record_gate, number)


@conforms(level="L7", gate="G7", clause=("5.1", "5.2"), negative=True, claims=(*FULL, INJECTION))
@pytest.mark.parametrize("number", [1, 10, 100])
def test_a_device_is_lost(
    tiny: TinyModels,
    capabilities: Capabilities,
    failing: FailingDevices,
    monkeypatch: pytest.MonkeyPatch,
    record_gate: GateRecorder,
    number: int,
) -> None:
    """From some kernel on nothing works: an error, no healthy device, and all is well with a new one."""
    monkeypatch.setenv(injector_variable(capabilities), f"lose={number}")
    began_s, said = time.monotonic(), "the engine's errors were checked"
    try:
        with tiny.open("dense") as llm:
            _fails_soon(llm, number)
            assert not failing.opened[-1].health(2.0).healthy, "a lost device says that it is healthy"
    except ZifError as error:
        said = str(error)
    assert said, "the error says nothing"
    assert time.monotonic() - began_s < SOON_S
    monkeypatch.delenv(injector_variable(capabilities))
    _serves(tiny, record_gate, number)


@conforms(level="L7", clause="5.2", negative=True, claims=(INJECTION,))
@pytest.mark.parametrize("deadline_s", [0.2, 1.0])
def test_a_kernel_that_hangs_does_not_hang_health(
    subject: Subject, capabilities: Capabilities, monkeypatch: pytest.MonkeyPatch, deadline_s: float
) -> None:
    monkeypatch.setenv(injector_variable(capabilities), "hang=1@4")
    with subject.opened() as device:
        began_s = time.monotonic()
        health = device.health(deadline_s)
        waited_s = time.monotonic() - began_s
        assert not health.healthy, "a device whose kernel hangs says that it is healthy"
        assert health.detail, "nothing is said about what is wrong"
        assert waited_s < deadline_s + 2, f"{waited_s:.1f} s for a deadline of {deadline_s} s"
        time.sleep(4.5 - min(4.0, waited_s))
        assert device.health(5.0).healthy, "a device that goes on is not healthy again"


@conforms(level="L7", gate="G7", clause="10.2", negative=True, claims=(*FULL, INJECTION))
def test_results_that_come_late_are_the_same(
    tiny: TinyModels, capabilities: Capabilities, monkeypatch: pytest.MonkeyPatch, record_gate: GateRecorder
) -> None:
    monkeypatch.setenv(injector_variable(capabilities), "late=0.002")
    _serves(tiny, record_gate, 5)


@conforms(level="L7", gate="G7", clause="10.4", negative=True, claims=FULL)
def test_requests_that_are_given_up_while_steps_run(tiny: TinyModels, record_gate: GateRecorder) -> None:
    """Streams that are dropped after some tokens, again and again: no block stays, and the others are not touched."""
    with tiny.open("dense") as llm:
        for number in range(1, 7):
            stream = llm.stream({"prompt_token_ids": prompt_tokens(15 + number, number)}, greedy(30))
            for _ in range(number):
                next(stream)
            assert isinstance(stream, Generator)
            stream.close()
            hold_answers(tiny.truth("dense"), record_gate, answer(llm, [prompt_tokens(19, number)], greedy(6)), 6)


@conforms(level="L7", clause=("5.1", "6.3"), negative=True, safety=Safety.MEMORY)
def test_closing_while_memory_is_lent(subject: Subject) -> None:
    """Everything goes back, whoever still lends; a second close is nothing."""
    for _ in range(3):
        with subject.opened() as device:
            for size in (1, 4096, 1 << 20):
                device.allocator.allocate(size, "conformance.l7")
        assert device.allocator.stats().allocated_bytes == 0
        device.close()


@conforms(level="L7", clause="5.2", negative=True)
@pytest.mark.parametrize("deadline_s", [0.0, 0.001, 0.1, 5.0])
def test_health_of_a_closed_device(subject: Subject, deadline_s: float) -> None:
    with subject.opened() as device:
        pass
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(device.health(deadline_s).healthy), daemon=True)
    thread.start()
    thread.join(SOON_S)
    assert answers == [False], "a closed device is healthy, or never says"
