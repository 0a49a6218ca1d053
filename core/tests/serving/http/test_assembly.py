"""All routes of a whole server, as `zif serve` has them: every one has a scope, and only known ones need no key."""

import asyncio
import json

import pytest

from serving.fakes import FakeEngine
from serving.http.calls import call
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.auth import parse_keys
from zif.serving.http.exchange import AuthScope
from zif.serving.http.openapi import openapi_document
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes
from zif.serving.page import page_routes
from zif.serving.responses.api import ResponsesApi
from zif.serving.telemetry.wiring import Telemetry

_PUBLIC = {"/", "/page.css", "/page.js", "/livez", "/readyz", "/health", "/version", "/openapi.json"}
_PATHS = {
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
    "/v1/completions/render",
    "/v1/chat/completions/render",
    "/metrics",
    "/props",
    "/load",
    "/reset_prefix_cache",
}

# Bounded by the body alone when they are decoded, and by their meaning before anything is made of them: a choice is one
# of a few words, a prompt's characters are compared with the model's length, a form is compiled in a limited worker.
_BOUNDED_BY_MEANING = {
    "ChatRequest.tool_choice.anyOf[0]",
    "CompletionRequest.prompt.anyOf[0]",
    "CompletionRequest.prompt.anyOf[1].items.anyOf[0]",
    "TokenizeRequest.prompt.anyOf[0]",
    "StructuredFields.json.anyOf[0]",
    "StructuredFields.regex.anyOf[0]",
    "StructuredFields.choice.anyOf[0]",
    "StructuredFields.choice.anyOf[0].items",
    "StructuredFields.grammar.anyOf[0]",
}


@pytest.fixture
def app():
    telemetry = Telemetry(FakeEngine(), log_requests=False)
    chats = ChatService(telemetry.engine)
    routes = [*page_routes(), *telemetry.routes(), *openai_routes(chats)]
    routes += [*AnthropicApi(chats).routes(), *ResponsesApi(chats).routes()]
    yield build_app(telemetry.engine, ServeSettings(), routes, parse_keys(["some-long-key"]))
    chats.close()


def test_every_promised_path_is_there(app):
    assert {route.path for route in app.context.registry.routes()} >= _PATHS | _PUBLIC


def test_only_known_routes_need_no_key(app):
    routes = app.context.registry.routes()
    assert {route.path for route in routes if route.scope is AuthScope.PUBLIC} == _PUBLIC


def test_no_guarded_route_answers_without_a_key(app):
    async def ask_all():
        for route in app.context.registry.routes():
            if route.scope is not AuthScope.PUBLIC:
                path = route.path.partition("{")[0] + ("x" if "{" in route.path else "")
                answer = await call(app, path, {} if route.method == "POST" else None, method=route.method)
                assert answer.status == 401, route.path
                wrong = await call(app, path, headers={"x-api-key": "wrong"}, method=route.method)
                assert wrong.status == 401, route.path

    asyncio.run(ask_all())


def test_guarded_routes_are_marked_in_the_document(app):
    document = json.loads(json.dumps(openapi_document(app.context.registry)))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert ("security" in operation) == (path not in _PUBLIC), (path, method)


def test_every_list_string_and_number_of_a_request_is_bounded(app):
    document = openapi_document(app.context.registry)
    schemas = [(name, part) for name, part in document["components"]["schemas"].items() if name[:7] != "answer."]
    found = {place for name, schema in schemas for place in _unbounded(schema, name)}
    assert found - _BOUNDED_BY_MEANING == set()


def _unbounded(schema, path):
    """Return the places where a value of a schema may be of any size."""
    kind = schema.get("type")
    limits = {
        "string": ("maxLength", "enum", "const"),
        "array": ("maxItems",),
        "integer": ("maximum", "exclusiveMaximum", "enum"),
    }
    if kind in limits and not any(limit in schema for limit in limits[kind]):
        yield path
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for index, inner in enumerate(schema.get(word, [])):
            yield from _unbounded(inner, f"{path}.{word}[{index}]")
    for name, inner in schema.get("properties", {}).items():
        yield from _unbounded(inner, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from _unbounded(schema[word], f"{path}.{word}")
