"""Runs over an engine that is a script: how many at once, in which order, and what follows when the engine goes."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from serving.fakes import MODEL_INFO, FakeEngine, Script
from zif.errors import ConfigError, EngineError, RequestError
from zif.serving.answers import EngineState, EngineUnavailableError, OverloadedError
from zif.serving.batch import patience, run
from zif.serving.batch.app_calls import AppCaller
from zif.serving.batch.journal import Journal
from zif.serving.batch.patience import PatientEngine
from zif.serving.batch.requests import parse_request
from zif.serving.batch.run import BatchRun, RunLimits, Tally, survey
from zif.serving.chat.service import ChatService
from zif.serving.engine.admission import Capacity
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes

CAPACITY = Capacity(max_running=8, max_running_tokens=1000, max_queued=8, max_queued_tokens=1000)


class CrashingEngine(FakeEngine):
    """A scripted engine that says who it worked on at once, and takes no more than `capacity`.

    A prompt that begins with a token of `deadly` ends every request under way, that many times.
    """

    def __init__(self, capacity=CAPACITY, deadly=(), script=None):
        super().__init__(script, replace(MODEL_INFO, max_num_seqs=8))
        self.capacity = capacity
        self.deadly = dict(deadly)
        self.under_way = {}
        self.most_samples = self.num_refused = 0
        self.crashes = []

    async def wait_ready(self):
        if self.state is EngineState.FAILED:
            raise EngineUnavailableError("the engine is down: it crashed too often")

    async def generate(self, prompt, sampling, priority=0):
        if sum(n for n, _ in self.under_way.values()) + sampling.n > self.capacity.max_samples:
            self.num_refused += 1
            raise OverloadedError("the queue is full", 0.001)
        me, gone = object(), asyncio.Event()
        self.under_way[me] = (sampling.n, gone)
        self.most_samples = max(self.most_samples, sum(n for n, _ in self.under_way.values()))
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            if self.deadly.get(prompt.token_ids[0], 0):
                self.deadly[prompt.token_ids[0]] -= 1
                self.crashes.append(len(self.under_way))
                for _, other in self.under_way.values():
                    other.set()
            for _ in range(3):
                await asyncio.sleep(0)
                if gone.is_set():
                    raise EngineUnavailableError("the engine ended while it answered")
            async for delta in super().generate(prompt, sampling, priority):
                yield delta
        finally:
            del self.under_way[me]


def line(custom_id, url="/v1/completions", **body):
    asked = {"custom_id": custom_id, "method": "POST", "url": url, "body": {"max_tokens": 2} | body}
    return json.dumps(asked).encode()


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Give a function that runs lines over an engine and returns what was written, and the tally."""
    monkeypatch.setattr(run, "_RETRY_S", 0)

    def answer(engine, lines, **limits):
        async def main():
            settings = ServeSettings()
            patient = PatientEngine(engine, engine.capacity)
            service = ChatService(patient)
            caller = AppCaller(build_app(patient, settings, openai_routes(service)))
            tally = Tally()
            journal = Journal(str(tmp_path / "out"))
            chosen = RunLimits(**{"max_running": 16, "max_body_bytes": 2**20} | limits)
            try:
                requests = [parse_request(content, number) for number, content in enumerate(lines, 1)]
                survey(requests, journal)
                async with asyncio.timeout(20):
                    await BatchRun(caller, patient, journal, tally, lambda: None).run(requests, chosen)
            finally:
                journal.close()
                service.close()
            return tally

        tally = asyncio.run(main())
        return SimpleNamespace(answers=written(tmp_path / "out"), tally=tally)

    return answer


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def statuses(answers):
    return {a["custom_id"]: a["response"] and a["response"]["status_code"] for a in answers}


def test_requests_are_answered_by_the_servers_routes_and_faults_on_their_own_lines(batch):
    lines = [
        line("good", prompt=[5, 6], colour="red"),
        line("wrong", prompt=[5], max_tokens="many"),
        line("lost", url="/v1/nothing"),
        line("looked", url="/reset_prefix_cache"),
        line("chat", url="/v1/chat/completions", messages=[{"role": "user", "content": "Hello"}]),
        b"{",
    ]
    done = batch(CrashingEngine(), lines)
    by_id = {answer["custom_id"]: answer for answer in done.answers}
    assert statuses(done.answers) == {"good": 200, "wrong": 400, "lost": None, "looked": None, "chat": 200, None: None}
    assert by_id["good"]["response"]["body"]["choices"][0]["text"] == " one two"
    assert by_id["wrong"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert by_id["lost"]["error"]["code"] == by_id["looked"]["error"]["code"] == "invalid_url"
    assert by_id[None]["error"] | {"message": ""} == {"code": "invalid_json", "message": "", "line": 6}
    assert (done.tally.num_answered, done.tally.num_failed, done.tally.num_output_tokens) == (6, 4, 4)
    assert list(done.tally.unknown_fields) == ["colour"]


def test_the_queue_is_full_and_never_too_full(batch):
    engine = CrashingEngine()
    lines = [line(f"r{k}", prompt=[[k + 1], [k + 2]], n=1 + k % 5) for k in range(60)]
    done = batch(engine, lines)
    assert set(statuses(done.answers).values()) == {200}
    assert len(done.answers) == 60
    assert engine.most_samples == CAPACITY.max_samples
    assert engine.num_refused == 0
    assert len(engine.submitted) == 120


def test_more_samples_than_ever_fit_are_refused_at_once(batch):
    class Refusing(CrashingEngine):
        async def generate(self, prompt, sampling, priority=0):
            if sampling.n > self.capacity.max_samples:
                raise RequestError("n exceeds what may run and wait")
            async for delta in super().generate(prompt, sampling, priority):
                yield delta

    done = batch(Refusing(), [line("a", prompt=[1], n=17), line("b", prompt=[1])])
    assert statuses(done.answers) == {"a": 400, "b": 200}


def test_requests_prepare_in_a_bounded_line(batch, monkeypatch):
    monkeypatch.setattr(patience, "MAX_PREPARING", 2)
    most = num = 0
    plain = ChatService.prompts

    async def prompts(self):
        nonlocal most, num
        num += 1
        most = max(most, num)
        await asyncio.sleep(0)
        num -= 1
        return await plain(self)

    monkeypatch.setattr(ChatService, "prompts", prompts)
    engine = CrashingEngine()
    done = batch(engine, [line(f"r{k}", prompt=[1]) for k in range(30)])
    assert (len(done.answers), most) == (30, 2)
    assert engine.most_samples > 2


def test_answers_keep_the_order_of_requests_when_asked_to(batch):
    def script(prompt, sampling):
        return Script(pieces=["x"] * (1 + 7 * (prompt.token_ids[0] % 4 == 1)))

    lines = [line(f"r{k}", prompt=[k + 1], max_tokens=9) for k in range(40)] + [b"{"]
    ids = [answer["custom_id"] for answer in batch(CrashingEngine(script=script), lines, ordered=True).answers]
    assert ids == [*(f"r{k}" for k in range(40)), None]


def test_bodies_are_held_within_their_bytes(batch):
    engine = CrashingEngine()
    lines = [line(f"r{k}", prompt=[k + 1], user="x" * 400) for k in range(20)]
    done = batch(engine, lines, max_body_bytes=1000)
    assert len(done.answers) == 20
    assert engine.most_samples == 2


def test_a_crash_costs_no_request_its_answer(batch):
    engine = CrashingEngine(deadly={7: 1})
    done = batch(engine, [line(f"r{k}", prompt=[k + 1]) for k in range(30)])
    assert set(statuses(done.answers).values()) == {200}
    assert len(engine.crashes) == 1
    assert len(done.answers) == 30
    assert done.tally.num_retries > 1


def test_only_the_request_that_the_engine_does_not_outlive_fails(batch):
    engine = CrashingEngine(deadly={7: 99})
    done = batch(engine, [line(f"r{k}", prompt=[k + 1]) for k in range(30)])
    assert {custom_id for custom_id, status in statuses(done.answers).items() if status != 200} == {"r6"}
    assert statuses(done.answers)["r6"] == 503
    assert len(engine.crashes) == run.MAX_ATTEMPTS
    assert engine.crashes[0] > 1
    assert engine.crashes[-1] == 1


def test_an_engine_that_is_down_for_good_ends_the_run_and_the_next_goes_on(batch, tmp_path):
    def script(prompt, sampling):
        if prompt.token_ids[0] == 20:
            engine.state = EngineState.FAILED
        return Script(error=EngineUnavailableError("down")) if engine.state is EngineState.FAILED else Script()

    engine = CrashingEngine(script=script)
    lines = [line(f"r{k}", prompt=[k + 1]) for k in range(30)]
    with pytest.raises(EngineError, match="crashed too often; answers so far are kept"):
        batch(engine, lines, max_running=4)
    first = statuses(written(tmp_path / "out"))
    assert 0 < len(first) < 30
    assert set(first.values()) == {200}
    second = CrashingEngine()
    done = batch(second, lines)
    assert len(done.answers) == len(statuses(done.answers)) == 30
    assert len(second.submitted) == 30 - len(first)


def test_ids_that_are_there_twice_are_refused_by_line_before_anything_runs(batch):
    engine = CrashingEngine()
    with pytest.raises(ConfigError, match="line 3 repeats the custom_id 'a'; line 4 repeats the custom_id 'b'"):
        batch(engine, [line("a", prompt=[1]), line("b", prompt=[1]), line("a", prompt=[2]), line("b", url=7)])
    assert engine.submitted == []
