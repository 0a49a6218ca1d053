"""A queue that is full: who is turned away, before what, and which routes ask it."""

import asyncio
import gc

from serving.fakes import FakeEngine
from serving.http.apis import AskApi, make_app
from serving.http.calls import Call, call
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.http.auth import parse_keys
from zif.serving.openai.api import openai_routes
from zif.serving.responses.api import ResponsesApi


def full_app(keys=None):
    engine = FakeEngine()
    engine.full = "the queue is full"
    return make_app(engine, AskApi(), keys)


def test_a_request_is_turned_away_before_its_body_is_read():
    async def ask():
        request = Call("/stream", parts=[asyncio.Event()])
        async with asyncio.timeout(5):
            await full_app()(request.scope, request.receive, request.send)
        return request.answer

    answer = asyncio.run(ask())
    assert (answer.status, answer.json()["error"]["message"]) == (429, "the queue is full")
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("2", "1500")


def test_turning_away_leaves_nothing_for_the_collector():
    """Garbage in cycles would pile up fastest when there is least time to collect it."""

    async def ask_often():
        app = full_app()
        for _ in range(10):
            await call(app, "/stream", {"text": "hi"})
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                await call(app, "/stream", {"text": "hi"})
            return gc.collect()
        finally:
            gc.enable()

    assert asyncio.run(ask_often()) < 50


def test_what_does_not_queue_is_answered():
    assert asyncio.run(call(full_app(), "/ask", {"text": "hi"})).status == 200
    assert asyncio.run(call(full_app(), "/livez")).status == 200


def test_strangers_do_not_learn_that_it_is_full():
    assert asyncio.run(call(full_app(parse_keys(["some-long-key-1"])), "/stream", {"text": "hi"})).status == 401


def test_the_routes_that_generate_ask_first():
    routes = [*openai_routes(None), *AnthropicApi(None).routes(), *ResponsesApi(None).routes()]
    asking = {route.path for route in routes if route.asks_engine}
    assert {"/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"} <= asking
    assert all("tokenize" not in path and "render" not in path and "count" not in path for path in asking)
