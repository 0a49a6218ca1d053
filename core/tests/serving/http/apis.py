"""A small API for tests of the server core: it echoes, streams from the engine, and fails on demand."""

import contextlib
from typing import Annotated

import msgspec

from zif.contract import SamplingParams
from zif.serving.answers import EnginePrompt
from zif.serving.http.app import build_app
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Response, Stream, event, json_response
from zif.serving.http.registry import Route
from zif.serving.http.settings import ServeSettings

NUM_BIG_BYTES = 2**24
"""More than the buffers of both ends of a connection hold."""


class Ask(msgspec.Struct):
    text: Annotated[str, msgspec.Meta(max_length=1000)]
    n: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1
    parts: list[dict[str, int]] = []
    user: str | None = None


class AskApi:
    def __init__(self, error: Exception | None = None):
        self.error = error
        self.requests = []

    def routes(self):
        return [
            Route("/ask", "POST", AuthScope.INFERENCE, self.ask, Ask, no_effect={"user": "nobody looks at it"}),
            Route("/small", "POST", AuthScope.INFERENCE, self.ask, Ask, max_body_bytes=64),
            Route("/stream", "POST", AuthScope.INFERENCE, self.stream, Ask, asks_engine=True),
            Route("/long", "POST", AuthScope.INFERENCE, self.long, Ask),
            Route("/things/{name}", "GET", AuthScope.INFERENCE, self.thing),
            Route("/manage", "POST", AuthScope.ADMIN, self.thing),
            Route("/numbers", "GET", AuthScope.METRICS, self.thing),
            Route("/big", "GET", AuthScope.METRICS, self.big, hidden=True),
        ]

    async def ask(self, request, context):
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return json_response({"text": request.body.text, "n": request.body.n, "unknown": request.unknown_fields})

    async def thing(self, request, context):
        self.requests.append(request)
        return json_response({"name": request.path_value, "query": request.query})

    async def big(self, request, context):
        return Response(bytes(NUM_BIG_BYTES))

    async def long(self, request, context):
        return Stream(self._frames(context.engine.generate(EnginePrompt([1]), SamplingParams(max_tokens=4096))))

    async def stream(self, request, context):
        prompt = EnginePrompt([1, 2, 3], cache_salt=request.caller.cache_salt(), tenant=request.caller.tenant)
        answer = context.engine.generate(prompt, SamplingParams(max_tokens=request.body.n))
        return Stream(self._frames(answer))

    async def _frames(self, answer):
        async with contextlib.aclosing(answer):
            async for delta in answer:
                yield event(msgspec.json.encode({"text": delta.samples[0].text}))
        yield event(b"[DONE]")


def make_app(engine, api=None, keys=None, observers=(), **settings):
    """Return an application with the small API."""
    return build_app(engine, ServeSettings(**settings), (api or AskApi()).routes(), keys, observers)


def refuse(message="no", **details):
    return ApiError(FailureKind.INVALID, message, **details)
