"""Telemetry in a server: the route of the metrics, who may read it, and what a request leaves behind."""

import asyncio
import json
import logging

import pytest

from serving.http.calls import Answer, Call, call
from serving.telemetry.scripted_engine import ScriptedEngine, delta
from zif.contract import SamplingParams
from zif.serving.answers import EnginePrompt, EngineState
from zif.serving.http.app import ServerApp
from zif.serving.http.auth import KeyRing, parse_keys
from zif.serving.http.exchange import AuthScope, Request, Stream, event
from zif.serving.http.registry import Route, ServerContext
from zif.serving.http.settings import ServeSettings
from zif.serving.telemetry.access_log import JsonLines
from zif.serving.telemetry.wiring import Telemetry

SECRET = "a canary that nobody may see"


async def answer(request: Request[None], context: ServerContext) -> Stream:
    """Stream what the engine gives, as the handlers of the APIs do."""

    async def frames():
        async for given in context.engine.generate(EnginePrompt([1], SECRET), SamplingParams()):
            yield event(f'"{given.samples[0].text}"'.encode())

    return Stream(frames())


def server(engine: ScriptedEngine, keys: KeyRing | None = None, **options: bool) -> ServerApp:
    telemetry = Telemetry(engine, **options)
    app = ServerApp(telemetry.engine, ServeSettings(), keys or KeyRing(), telemetry.observers(), telemetry.routes())
    app.install([Route("/answer", "GET", AuthScope.INFERENCE, answer)])
    return app


def asked(app: ServerApp, *paths: str, **options: object) -> list[Answer]:
    async def run() -> list[Answer]:
        return [await call(app, path, **options) for path in paths]

    return asyncio.run(run())


def test_a_request_is_counted_by_its_route_and_its_answer_by_the_engine() -> None:
    app = server(ScriptedEngine([delta(5), delta(6, reason="stop")]))
    *_, metrics = asked(app, "/answer", "/nowhere/secret", "/metrics")
    text = metrics.body.decode()
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert 'zif:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 1.0' in text
    assert 'route="/answer",status="200"} 1.0' in text
    assert 'route="none",status="404"} 1.0' in text
    assert "secret" not in text


def test_methods_are_labels_of_ours() -> None:
    app = server(ScriptedEngine())
    asked(app, "/answer", method="BREW" * 10)
    (metrics,) = asked(app, "/metrics")
    assert 'method="other"' in metrics.body.decode()
    assert b"BREW" not in metrics.body


def test_metrics_are_there_while_the_engine_starts() -> None:
    engine = ScriptedEngine(known=None, state=EngineState.STARTING)
    telemetry = Telemetry(engine)
    app = ServerApp(telemetry.engine, ServeSettings(), KeyRing(), telemetry.observers(), telemetry.routes())
    early, metrics = asked(app, "/answer", "/metrics")
    assert (early.status, metrics.status) == (503, 200)
    assert b'state="starting"} 1.0' in metrics.body


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("metrics-key", 200), ("inference-key", 403)])
def test_metrics_need_their_scope(key: str | None, status: int) -> None:
    keys = parse_keys(["metrics-key scopes=metrics", "inference-key scopes=inference"])
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    (metrics,) = asked(server(ScriptedEngine(), keys), "/metrics", headers=headers)
    assert metrics.status == status


def test_lines_say_how_requests_ended_and_nothing_of_their_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zif")
    asked(server(ScriptedEngine([delta(5), delta(6, reason="stop")])), "/answer")
    lines = [JsonLines().format(entry) for entry in caplog.records if entry.name == "zif.access"]
    assert [json.loads(line)["route"] for line in lines] == ["/answer"]
    assert SECRET not in caplog.text + "".join(lines)


def test_lines_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zif")
    asked(server(ScriptedEngine([delta(6, reason="stop")]), log_requests=False), "/answer")
    assert [entry for entry in caplog.records if entry.name == "zif.access"] == []


def test_a_client_that_leaves_is_an_abort_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zif")
    waits = asyncio.Event()

    class Endless(ScriptedEngine):
        async def generate(self, prompt, sampling, priority=0):
            try:
                yield delta(5)
                await waits.wait()
            finally:
                self.closed += 1

    engine = Endless()
    app = server(engine)

    async def run() -> Answer:
        request = Call("/answer")
        task = asyncio.create_task(app(request.scope, request.receive, request.send))
        await asyncio.wait_for(request.chunk_came.wait(), 10)
        request.leave()
        await asyncio.wait_for(task, 10)
        return await call(app, "/metrics")

    metrics = asyncio.run(run())
    assert (
        'zif:request_success_total{engine="0",finished_reason="abort",model_name="tiny"} 1.0' in metrics.body.decode()
    )
    assert engine.closed == 1
    (line,) = [json.loads(JsonLines().format(entry)) for entry in caplog.records if entry.name == "zif.access"]
    assert line["finish_reason"] == "abort"
