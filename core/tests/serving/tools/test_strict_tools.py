"""`strict` in the three APIs: it reaches the engine as a grammar, and only where the caller said so."""

import asyncio

import pytest

from serving.fakes import Script
from serving.hermes_model import MODEL, PARAMETERS, Served, write_model
from serving.http.calls import call
from zif.errors import RequestError
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes

USER = [{"role": "user", "content": "a"}]
FUNCTION = {"name": "f", "parameters": PARAMETERS}


def body_of(path, strict):
    """Return a request with one tool, which is strict, or not, or says nothing of it."""
    said = {} if strict is None else {"strict": strict}
    if path == "/v1/messages":
        tool = {"name": "f", "input_schema": PARAMETERS, **said}
        return {"model": MODEL, "messages": USER, "max_tokens": 5, "tools": [tool]}
    if path == "/v1/responses":
        return {"model": MODEL, "input": USER, "tools": [{"type": "function", **FUNCTION, **said}]}
    return {"model": MODEL, "messages": USER, "tools": [{"type": "function", "function": {**FUNCTION, **said}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hermes"))


def post(served, path, body):
    chats = ChatService(served.engine, format_name="hermes")
    app = build_app(served.engine, ServeSettings(), openai_routes(chats)) if "chat" in path else served.app
    answer = asyncio.run(call(app, path, body))
    chats.close()
    served.chats.close()
    return answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("strict", [True, False, None])
def test_only_strict_tools_hold_the_answer(folder, path, strict):
    served = Served(folder, Script(pieces=["a"]))
    answer = post(served, path, body_of(path, strict))
    assert answer.status == 200, answer.body
    structured = served.engine.submitted[-1].sampling.structured
    assert (structured is not None) is bool(strict)
    assert not strict or ("<tool_call>" in structured.grammar and '"city"' in structured.grammar)


def test_a_strict_schema_that_cannot_be_kept_names_the_tools(folder):
    async def refuse(form):
        raise RequestError("grammar cannot be compiled: too large")

    served = Served(folder, Script(pieces=["a"]))
    chats = ChatService(served.engine, format_name="hermes", check_form=refuse)
    app = build_app(served.engine, ServeSettings(), openai_routes(chats))
    answer = asyncio.run(call(app, "/v1/chat/completions", body_of("/v1/chat/completions", True)))
    assert answer.status == 400
    assert answer.json()["error"]["message"].startswith("tools: calls cannot be held to their strict schemas: grammar")
    assert served.engine.submitted == []
    chats.close()
    served.chats.close()
