"""The path of a request through the server: route, caller, body, handler, answer; and what goes wrong on the way."""

import asyncio
import gc
import json
import logging

import pytest

from serving.fakes import FakeEngine, Script, make_stats
from serving.http.apis import AskApi, make_app, refuse
from serving.http.calls import Call, call
from zif.errors import RequestError
from zif.serving.answers import EngineState, EngineUnavailableError, OverloadedError
from zif.serving.http.app import ServerApp
from zif.serving.http.auth import KeyRing
from zif.serving.http.openapi import openapi_document
from zif.serving.http.settings import ServeSettings


def run(coroutine):
    return asyncio.run(coroutine)


def error_of(answer):
    return answer.json()["error"]


class TestAnswers:
    def test_a_body_is_decoded_and_answered(self):
        answer = run(call(make_app(FakeEngine()), "/ask", {"text": "hi", "n": 2}))
        assert (answer.status, answer.json()) == (200, {"text": "hi", "n": 2, "unknown": []})
        assert answer.headers["content-type"] == "application/json"
        assert int(answer.headers["content-length"]) == len(answer.body)

    def test_the_end_of_a_path_is_a_value_and_the_query_is_read(self):
        answer = run(call(make_app(FakeEngine()), "/things/a/b", query=b"x=1&y=%20"))
        assert answer.json() == {"name": "a/b", "query": {"x": "1", "y": " "}}

    def test_unknown_fields_are_named_in_a_header(self):
        answer = run(call(make_app(FakeEngine()), "/ask", {"text": "hi", "tempreture": 1, "a b": 2}))
        assert answer.status == 200
        assert answer.headers["zif-unknown-fields"] == "tempreture"

    def test_unknown_fields_are_refused_in_strict_mode(self):
        answer = run(call(make_app(FakeEngine(), strict=True), "/ask", {"text": "hi", "tempreture": 1}))
        assert (answer.status, error_of(answer)["param"]) == (400, "tempreture")

    @pytest.mark.parametrize("given", ["abc-1.2:3_Z", "x" * 128])
    def test_a_harmless_request_id_is_echoed_and_not_used(self, given):
        api = AskApi()
        answer = run(call(make_app(FakeEngine(), api), "/ask", {"text": "hi"}, headers={"x-request-id": given}))
        assert answer.headers["x-request-id"] == given
        assert api.requests[0].id != given
        assert len(api.requests[0].id) == 32

    @pytest.mark.parametrize("given", ["a b", "x" * 129, "a\tb", "\xe9", "a;b"])
    def test_other_request_ids_are_not_echoed(self, given):
        api = AskApi()
        answer = run(call(make_app(FakeEngine(), api), "/ask", {"text": "hi"}, headers={"x-request-id": given}))
        assert answer.headers["x-request-id"] == api.requests[0].id


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (RequestError("temperature=3 is out of range"), 400, "invalid"),
            (refuse("no", param="text", code="bad_text"), 400, "bad_text"),
            (OverloadedError("the queue is full", 1.5), 429, "overloaded"),
            (EngineUnavailableError("the engine restarts"), 503, "engine_unavailable"),
        ],
    )
    def test_known_errors_have_their_status(self, error, status, code):
        answer = run(call(make_app(FakeEngine(), AskApi(error)), "/ask", {"text": "hi"}))
        assert (answer.status, error_of(answer)["code"]) == (status, code)
        assert (str(error) in error_of(answer)["message"]) == (status < 500), "the cause of an outage is ours to know"

    def test_overload_says_when_to_come_again(self):
        answer = run(call(make_app(FakeEngine(), AskApi(OverloadedError("full", 1.5))), "/ask", {"text": "hi"}))
        names = ("retry-after", "retry-after-ms", "x-should-retry")
        assert [answer.headers[name] for name in names] == ["2", "1500", "true"]

    def test_a_wrong_request_is_not_worth_another_try(self):
        answer = run(call(make_app(FakeEngine(), AskApi(RequestError("no"))), "/ask", {"text": "hi"}))
        assert answer.headers["x-should-retry"] == "false"

    def test_a_fault_of_ours_tells_an_id_and_nothing_else(self, caplog):
        api = AskApi(RuntimeError("secret /root/path 0xdeadbeef"))
        with caplog.at_level(logging.ERROR, "zif.serving"):
            answer = run(call(make_app(FakeEngine(), api), "/ask", {"text": "hi"}))
        assert answer.status == 500
        assert b"secret" not in answer.body
        assert api.requests[0].id in error_of(answer)["message"]
        assert [record.exc_info[1] for record in caplog.records] == [api.error]

    def test_nothing_there(self):
        answer = run(call(make_app(FakeEngine()), "/v1/nothing"))
        assert (answer.status, error_of(answer)["code"]) == (404, "not_found")

    def test_a_wrong_method_is_told_the_right_ones(self):
        answer = run(call(make_app(FakeEngine()), "/ask"))
        assert (answer.status, answer.headers["allow"]) == (405, "POST")

    def test_too_many_query_fields(self):
        answer = run(call(make_app(FakeEngine()), "/things/x", query=b"&".join(b"a%d=1" % k for k in range(40))))
        assert answer.status == 400

    def test_other_protocols_are_refused(self):
        app = make_app(FakeEngine())
        with pytest.raises(ValueError, match="HTTP only"):
            run(app({"type": "websocket"}, None, None))


class TestStreams:
    def test_frames_come_in_order_and_end(self):
        engine = FakeEngine()
        answer = run(call(make_app(engine), "/stream", {"text": "hi", "n": 3}))
        texts = [json.loads(line[6:])["text"] for line in answer.body.split(b"\n\n")[:-2]]
        assert texts == [" one", " two", " three"]
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.ended
        assert engine.aborted == []

    def test_an_error_before_the_first_frame_is_a_status(self):
        answer = run(call(make_app(FakeEngine(Script(error=OverloadedError("full", 2)))), "/stream", {"text": "hi"}))
        assert (answer.status, answer.headers["retry-after"]) == (429, "2")

    def test_an_error_in_the_middle_ends_the_stream(self):
        script = Script(pieces=["a", "b", "c"], error=EngineUnavailableError("the engine is gone"), error_at=2)
        answer = run(call(make_app(FakeEngine(script)), "/stream", {"text": "hi", "n": 3}))
        frames = answer.body.split(b"\n\n")
        assert answer.status == 200
        assert json.loads(frames[2][6:])["error"]["code"] == "engine_unavailable"
        assert frames[3:] == [b"data: [DONE]", b""]
        assert answer.ended

    def test_a_client_that_leaves_aborts_at_once(self):
        async def leave():
            never = asyncio.Event()
            engine = FakeEngine(Script(gates=[_set_event(), never]))
            records = []
            request = Call("/stream", {"text": "hi", "n": 4})
            app = make_app(engine, observers=[records.append])
            task = asyncio.create_task(app(request.scope, request.receive, request.send))
            async with asyncio.timeout(5):
                await request.chunk_came.wait()
                request.leave()
                await task
                await engine.submitted[0].ended.wait()
            assert engine.submitted[0].aborted
            assert records[0].aborted
            assert app.status.num_in_flight == 0

        run(leave())

    def test_a_client_that_leaves_before_the_answer_aborts_too(self):
        async def leave():
            engine = FakeEngine(Script(gates=[asyncio.Event()]))
            request = Call("/stream", {"text": "hi"})
            aborted = []
            request.scope["state"]["abort_connection"] = lambda: aborted.append(True)
            task = asyncio.create_task(make_app(engine)(request.scope, request.receive, request.send))
            async with asyncio.timeout(5):
                while not engine.submitted:
                    await asyncio.sleep(0)
                request.leave()
                await task
            assert engine.submitted[0].aborted
            assert aborted == [True]
            assert request.answer.status == 0

        run(leave())

    def test_silence_is_filled_with_comments(self):
        async def wait():
            gate = asyncio.Event()
            request = Call("/stream", {"text": "hi", "n": 1})
            app = make_app(FakeEngine(Script(gates=[gate])))
            _set(app, event_keep_alive_s=0.02)
            task = asyncio.create_task(app(request.scope, request.receive, request.send))
            async with asyncio.timeout(5):
                while len(request.answer.chunks) < 2:
                    request.chunk_came.clear()
                    await request.chunk_came.wait()
                gate.set()
                await task
            assert request.answer.chunks[:2] == [b": keep-alive\n\n"] * 2
            assert request.answer.body.endswith(b"data: [DONE]\n\n")

        run(wait())

    def test_a_slow_reader_takes_no_more_from_the_engine_than_it_reads(self):
        async def read_slowly():
            engine = FakeEngine()
            request = Call("/stream", {"text": "hi", "n": 8})
            task = asyncio.create_task(make_app(engine)(request.scope, request.receive, request.send))
            await request.chunk_came.wait()
            request.reads.clear()
            for _ in range(100):
                await asyncio.sleep(0)
            assert engine.submitted[0].num_deltas <= len(request.answer.chunks) + 1
            request.reads.set()
            async with asyncio.timeout(5):
                await task
            assert len(request.answer.body.split(b"\n\n")) == 10

        run(read_slowly())


class TestDrain:
    def test_work_under_way_ends_and_new_work_is_refused(self):
        async def drain():
            gate = asyncio.Event()
            app = make_app(FakeEngine(Script(gates=[gate])))
            request = Call("/stream", {"text": "hi"})
            task = asyncio.create_task(app(request.scope, request.receive, request.send))
            await asyncio.sleep(0)
            app.begin_drain()
            refused = await call(app, "/ask", {"text": "hi"})
            ready, alive = await call(app, "/readyz"), await call(app, "/livez")
            assert (refused.status, ready.status, alive.status) == (503, 503, 200)
            assert not await app.drained(0.01)
            gate.set()
            assert await app.drained(5)
            assert task.done()
            assert request.answer.body.endswith(b"[DONE]\n\n")

        run(drain())

    def test_what_takes_too_long_is_told_so(self):
        async def drain():
            app = make_app(FakeEngine(Script(gates=[_set_event(), asyncio.Event()])))
            streaming, waiting = Call("/stream", {"text": "hi", "n": 3}), Call("/stream", {"text": "hi"})
            app_of_waiting = make_app(FakeEngine(Script(gates=[asyncio.Event()])))
            calls = [(app, streaming), (app_of_waiting, waiting)]
            tasks = [asyncio.create_task(a(r.scope, r.receive, r.send)) for a, r in calls]
            await streaming.chunk_came.wait()
            for server in (app, app_of_waiting):
                server.interrupt_all()
                assert await server.drained(5)
            assert b"the server shuts down" in streaming.answer.body
            assert (streaming.answer.status, waiting.answer.status) == (200, 503)
            assert all(task.done() and not task.cancelled() for task in tasks)

        run(drain())


class TestOwnRoutes:
    def test_ready(self):
        engine = FakeEngine()
        for path in ("/readyz", "/health", "/livez"):
            assert run(call(make_app(engine), path)).status == 200
        engine.problem_text = "no step for 11 s"
        for path in ("/readyz", "/health"):
            answer = run(call(make_app(engine), path))
            assert (answer.status, answer.json()["reason"]) == (503, "no step for 11 s")
        assert run(call(make_app(engine), "/livez")).status == 200
        engine.state = EngineState.FAILED
        assert run(call(make_app(engine), "/livez")).status == 503

    def test_an_engine_that_is_ready_is_not_yet_a_server(self):
        app = ServerApp(FakeEngine(), ServeSettings(), KeyRing([]))
        before = run(call(app, "/readyz"))
        app.install([])
        after = run(call(app, "/readyz"))
        assert (before.status, before.json()["reason"], after.status) == (503, "the server is starting", 200)

    def test_props_tells_the_model_and_what_has_no_effect_and_no_path(self):
        props = run(call(make_app(FakeEngine()), "/props"))
        assert props.json()["no_effect"] == {"/ask": {"user": "nobody looks at it"}}
        assert props.json()["model"]["max_model_len"] == 1024
        assert b"examples" not in props.body

    def test_load(self):
        engine = FakeEngine()
        engine.stats = make_stats(num_running=3, num_waiting=2, kv_usage=0.5)
        assert run(call(make_app(engine), "/load")).json() == {
            "server_load": 1,
            "num_requests_running": 3,
            "num_requests_waiting": 2,
            "kv_cache_usage": 0.5,
        }

    def test_the_document_lists_every_route_with_its_fields(self):
        app = make_app(FakeEngine())
        document = openapi_document(app.context.registry)
        assert json.loads(run(call(app, "/openapi.json")).body) == json.loads(json.dumps(document))
        shown = {(path, method) for path, methods in document["paths"].items() for method in methods}
        routes = app.context.registry.routes()
        assert shown == {(route.path, route.method.lower()) for route in routes if not route.hidden}
        assert document["components"]["schemas"]["Ask"]["properties"]["n"]["maximum"] == 8

    def test_before_the_apis_are_there_the_rest_is_starting(self):
        engine = FakeEngine()
        engine.model_info, engine.state, engine.problem_text = None, EngineState.STARTING, "loading weights"
        app = ServerApp(engine, ServeSettings(), KeyRing())
        statuses = [run(call(app, path)).status for path in ("/livez", "/readyz", "/v1/models", "/props", "/load")]
        assert statuses == [200, 503, 503, 503, 200]
        app.install(AskApi().routes())
        assert run(call(app, "/ask", {"text": "hi"})).status == 200


class TestRecords:
    def test_an_observer_hears_of_every_request(self):
        records = []
        app = make_app(FakeEngine(), observers=[records.append])
        run(call(app, "/ask", {"text": "hi"}))
        run(call(app, "/ask", {"text": 1}))
        run(call(app, "/nothing"))
        seen = [(record.route, record.status, record.failure) for record in records]
        assert seen == [("/ask", 200, None), ("/ask", 400, "invalid"), ("", 404, "not_found")]
        assert all(record.ended_s >= record.started_s for record in records)

    def test_an_observer_that_fails_harms_nobody(self, caplog):
        def fail(record):
            raise RuntimeError("no")

        with caplog.at_level(logging.ERROR, "zif.serving"):
            assert run(call(make_app(FakeEngine(), observers=[fail]), "/ask", {"text": "hi"})).status == 200
        assert len(caplog.records) == 1


def test_many_requests_leave_nothing_behind():
    async def ask_often():
        api = AskApi()
        app = make_app(FakeEngine(), api)
        for _ in range(100):
            await call(app, "/stream", {"text": "hi", "n": 2})
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(1000):
            await call(app, "/ask", {"text": "hi"})
        api.requests.clear()
        await asyncio.sleep(0)  # the loop drops timers that were cancelled
        gc.collect()
        assert len(gc.get_objects()) - before < 500
        assert app.status.num_in_flight == 0

    run(ask_often())


def _set_event():
    gate = asyncio.Event()
    gate.set()
    return gate


def _set(app, **seconds):
    """Set limits below the second that a setting may have."""
    for name, value in seconds.items():
        object.__setattr__(app.context.settings, name, value)
