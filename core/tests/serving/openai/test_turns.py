"""Long answers are written piece by piece: between two pieces others get a turn of the event loop."""

import asyncio
import contextlib

import msgspec
import pytest

from serving.anthropic.asked import ASK
from serving.fakes import FakeEngine, Script
from serving.http.calls import call
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.exchange import Headers
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes
from zif.serving.openai.logprobs import POSITIONS_PER_TURN
from zif.serving.responses.api import ResponsesApi

PROMPTS = ["a"] * 300
LONG = [5] * 1000


def answer_and_turns(path, body):
    """Return the answer to a request, and how many turns somebody else got meanwhile."""
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run():
        engine = FakeEngine(Script(pieces=["a"]))
        chats = ChatService(engine)
        await chats.load()
        app = build_app(engine, ServeSettings(), openai_routes(chats))
        counting = asyncio.create_task(count())
        try:
            return await call(app, path, body)
        finally:
            counting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await counting
            chats.close()

    return asyncio.run(run()), turns


@pytest.mark.parametrize(
    ("body", "least"),
    [
        ({"prompt": PROMPTS, "echo": True}, 3 * len(PROMPTS)),
        ({"prompt": "a", "n": 128}, 128),
        ({"prompt": LONG, "prompt_logprobs": 1}, len(LONG) // POSITIONS_PER_TURN),
        ({"prompt": LONG, "echo": True, "logprobs": 1}, len(LONG) // POSITIONS_PER_TURN),
        ({"prompt": LONG, "echo": True, "logprobs": 1, "stream": True}, len(LONG) // POSITIONS_PER_TURN),
    ],
)
def test_others_get_turns(body, least):
    answer, turns = answer_and_turns("/v1/completions", {"max_tokens": 1, **body})
    assert answer.status == 200, answer.body
    _, idle = answer_and_turns("/v1/completions", {"max_tokens": 1, "prompt": "a"})
    assert turns - idle >= least - 1


def test_counts_are_those_of_all_prompts():
    answer, _ = answer_and_turns("/v1/completions", {"prompt": [[5] * 3, [6] * 4], "n": 2, "max_tokens": 2})
    usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 4, 11)
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2, 3]


CHAT = {"messages": ASK["messages"]}
ASKED = {
    "/v1/completions": {"prompt": "a", "echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True},
    "/v1/completions/render": {"prompt": "a"},
    "/v1/chat/completions": {**CHAT, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "n": 2},
    "/v1/chat/completions/render": CHAT,
    "/tokenize": {"prompt": "a", "return_token_strs": True},
    "/detokenize": {"tokens": [5]},
    "/v1/messages": {**ASK, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": ASK["model"], **CHAT},
    "/v1/responses": {"input": "a"},
    "/v1/responses/input_tokens": {"input": "a"},
    "/v1/models": None,
    "/livez": None,
    "/readyz": None,
    "/load": None,
}


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_has_the_type_that_the_document_tells(path):
    async def run():
        engine = FakeEngine(Script(pieces=["a", "b"]))
        chats = ChatService(engine)
        try:
            routes = [*openai_routes(chats), *AnthropicApi(chats).routes(), *ResponsesApi(chats).routes()]
            app = build_app(engine, ServeSettings(), routes)
            answer = await call(app, path, ASKED[path])
            assert answer.status == 200, answer.body
            route = app.find(path, "GET" if ASKED[path] is None else "POST", Headers([])).route
            assert msgspec.json.decode(answer.body, type=route.answer_type)
            wrong = await call(app, path, {"model": 1}, method="POST")
            if ASKED[path] is not None:
                assert wrong.status == 400
                assert msgspec.json.decode(wrong.body, type=route.errors.answer_type).error.message
        finally:
            chats.close()

    asyncio.run(run())
