"""Both official clients over the engine in its own process, with the embedded model."""

import asyncio
import json
from contextlib import asynccontextmanager

import anthropic
import httpx2
import openai
import pytest

from support.embedded_model import MODEL
from zif.serving.engine.client import ProcessEngine
from zif.serving.http.app import build_app
from zif.serving.http.assembly import open_apis
from zif.serving.http.settings import ServeSettings
from zif.settings import EngineSettings

LIMIT_S = 90.0
OPTIONS = {"max_model_len": 256, "kv_bytes": 1 << 24, "max_num_seqs": 4}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
QUESTION = "What is a plugin?"


@asynccontextmanager
async def open_clients(platform):
    """Give an official client of each API, of a server whose engine is a process."""
    settings = ServeSettings(served_model_name="embedded")
    engine_settings = EngineSettings(model=str(MODEL), platform=platform, **OPTIONS)
    async with asyncio.timeout(LIMIT_S), ProcessEngine(engine_settings) as engine:
        await engine.wait_ready()
        async with (
            open_apis(engine, settings) as routes,
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app=build_app(engine, settings, routes))) as http,
        ):
            yield (
                openai.AsyncOpenAI(api_key="k", base_url="http://localhost/v1", http_client=http, max_retries=0),
                anthropic.AsyncAnthropic(api_key="k", base_url="http://localhost", http_client=http, max_retries=0),
            )


@pytest.mark.slow
def test_all_three_apis_give_the_same_answer_whole_and_streamed():
    async def main():
        async with open_clients("cpu") as (openai_client, anthropic_client):
            greedy = {"model": "embedded", "temperature": 0}
            messages = [{"role": "user", "content": QUESTION}]
            chat = await openai_client.chat.completions.create(messages=messages, max_tokens=12, **greedy)
            asked = {"input": QUESTION, "max_output_tokens": 12, **greedy}
            response = await openai_client.responses.create(**asked)
            deltas = [
                event.delta
                async for event in await openai_client.responses.create(**asked, stream=True)
                if event.type == "response.output_text.delta"
            ]
            asked = {"model": "embedded", "max_tokens": 12, "messages": messages, "extra_body": {"temperature": 0}}
            message = await anthropic_client.messages.create(**asked)
            async with anthropic_client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
            count = await anthropic_client.messages.count_tokens(model="embedded", messages=messages)
            return chat, response, deltas, message, streamed, count

    chat, response, deltas, message, streamed, count = asyncio.run(main())
    text = chat.choices[0].message.content
    assert text
    assert response.output_text == "".join(deltas) == message.content[0].text == streamed.content[0].text == text
    assert len(deltas) > 1
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == usage.output_tokens == chat.usage.completion_tokens


@pytest.mark.slow
def test_forms_and_forced_calls_are_kept():
    async def main():
        async with open_clients("cpu") as (openai_client, anthropic_client):
            form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
            response = await openai_client.responses.create(
                model="embedded", input=QUESTION, text=form, max_output_tokens=60
            )
            message = await anthropic_client.messages.create(
                model="embedded",
                max_tokens=60,
                messages=[{"role": "user", "content": QUESTION}],
                tools=[{"name": "toggle", "input_schema": SCHEMA}],
                tool_choice={"type": "any", "disable_parallel_tool_use": True},
            )
            with pytest.raises(anthropic.BadRequestError):
                await anthropic_client.messages.create(
                    model="embedded",
                    max_tokens=60,
                    messages=[{"role": "user", "content": QUESTION}],
                    output_config={"format": {"type": "json_schema", "schema": {"$ref": "#/no"}}},
                )
            return response, message

    response, message = asyncio.run(main())
    assert isinstance(json.loads(response.output_text)["ok"], bool)
    assert (message.content[0].name, message.stop_reason) == ("toggle", "tool_use")
    assert isinstance(message.content[0].input["ok"], bool)
