"""Random requests against all routes over a scripted engine: nothing but answers and clear refusals comes back."""

import asyncio

import pytest

from serving.fakes import FakeEngine
from serving.http.fuzz import Generator, fuzz
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.openapi import openapi_document
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes
from zif.serving.responses.api import ResponsesApi


@pytest.mark.parametrize(("num_requests", "seed"), [(400, 1), pytest.param(8_000, 2, marks=pytest.mark.slow)])
def test_random_requests(num_requests, seed):
    async def run():
        engine = FakeEngine()
        chats = ChatService(engine)
        await chats.load()
        routes = [*openai_routes(chats), *AnthropicApi(chats).routes(), *ResponsesApi(chats).routes()]
        app = build_app(engine, ServeSettings(), routes)
        try:
            statuses = await fuzz(app, Generator(openapi_document(app.context.registry), seed), range(num_requests))
        finally:
            chats.close()
        assert statuses[200] > num_requests // 20, "too few requests get through to mean anything"
        assert statuses[400] > num_requests // 20
        assert app.status.num_in_flight == 0
        assert all(submission.finished or submission.aborted for submission in engine.submitted)

    asyncio.run(run())
