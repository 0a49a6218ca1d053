"""JSON with odd values, as models write it within calls and clients send it back."""

import asyncio
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.anthropic.asked import ASK, create, raw_events
from serving.fakes import FakeEngine, Script
from serving.hermes_model import PARAMETERS, replace_info, write_model
from serving.http.calls import call
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.anthropic.cut_json import readable_members
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.json_text import read_json, whole_characters
from zif.serving.openai.api import openai_routes
from zif.serving.responses.api import ResponsesApi
from zif.serving.workers.pool import WorkerPool

ODD = r'{"city": "a\ud800\ud83d\ude00\udc00", "\udfff": 1e999, "n": 1180591620717411303424}'
AS_READ = b'{"city":"a\xef\xbf\xbd\xf0\x9f\x98\x80\xef\xbf\xbd","\xef\xbf\xbd":1e999,"n":1180591620717411303424}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hermes"))


halves = st.sampled_from(
    [r"\ud800", r"\uDBff", r"\udc00", r"\uDFFF", "\\\\", r"\n", "u", "d800", "\ud800", "😀", "\\u00e9"]
)


@given(st.lists(halves, max_size=8))
def test_every_text_of_halves_has_utf8_and_what_is_whole_stays(pieces):
    text = '"' + "".join(pieces) + '"'
    read, by_json = read_json(text), json.loads(text)
    read.encode()
    assert read == re.sub("[\ud800-\udfff]", "\ufffd", by_json)
    assert whole_characters(whole_characters(text)) == whole_characters(text)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', "[" * 100_000, "{"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises((ValueError, RecursionError)):
        read_json(text)


def test_a_call_is_given_out_with_its_numbers_and_whole_characters(folder):
    assert msgspec.json.encode(readable_members(ODD)) == AS_READ
    script = Script(pieces=['<tool_call>\n{"name": "get_weather", "arguments": ' + ODD + "}\n</tool_call>"])
    tools = [{"name": "get_weather", "input_schema": PARAMETERS}]
    _, message = create(folder, script, tools=tools)
    assert message.content[0].input["city"] == "a\ufffd😀\ufffd"
    assert message.content[0].input["n"] == 2**70
    streamed = [event["delta"] for _, event in raw_events(folder, script, tools=tools) if event.get("delta")]
    assert "".join(delta.get("partial_json", "") for delta in streamed) == ODD


ODD_CALL = {"name": "get_weather", "arguments": ODD.replace("1e999", "1e99")}
LATER_TURNS = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": ODD_CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "c"},
        ],
    },
    "/v1/messages": {
        **ASK,
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"n": 2**70}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "c"}]},
        ],
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "1", **ODD_CALL},
            {"type": "function_call_output", "call_id": "1", "output": "c"},
        ]
    },
}


def test_later_turns_may_repeat_such_a_call(folder):
    async def run():
        engine, pool = FakeEngine(Script(pieces=["b"]), info=replace_info(folder)), WorkerPool(None, 1)
        chats = ChatService(engine, pool.render, "hermes")
        await pool.start()
        try:
            routes = [*openai_routes(chats), *AnthropicApi(chats).routes(), *ResponsesApi(chats).routes()]
            app = build_app(engine, ServeSettings(), routes)
            prompts = await chats.prompts()
            for path, body in LATER_TURNS.items():
                answer = await call(app, path, body)
                assert answer.status == 200, answer.body
                prompt = prompts.tokenizer.decode(engine.submitted[-1].prompt.token_ids, skip_special_tokens=False)
                assert str(2**70) in prompt, path
        finally:
            chats.close()
            await pool.close()

    asyncio.run(run())
