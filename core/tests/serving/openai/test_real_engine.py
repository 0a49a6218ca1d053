"""The OpenAI client over the engine in its own process, with the embedded model and with the platform that hashes."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx2
import openai
import pytest

from support.embedded_model import MODEL
from zif import LLM, SamplingParams
from zif.serving.engine.client import ProcessEngine
from zif.serving.http.app import build_app
from zif.serving.http.assembly import open_apis
from zif.serving.http.settings import ServeSettings
from zif.settings import EngineSettings

PROMPT = "Once upon a time there was a little"
CHAT = [{"role": "user", "content": "What is a plugin?"}]
LIMIT_S = 90.0
OPTIONS = {"max_model_len": 256, "kv_bytes": 1 << 24, "max_num_seqs": 4}


@asynccontextmanager
async def open_client(platform, answer_format=None):
    """Give an official client of a server whose engine is a process."""
    settings = ServeSettings(served_model_name="embedded", answer_format=answer_format)
    async with (
        asyncio.timeout(LIMIT_S),
        ProcessEngine(EngineSettings(model=str(MODEL), platform=platform, **OPTIONS)) as engine,
    ):
        await engine.wait_ready()
        async with open_apis(engine, settings) as routes:
            transport = httpx2.ASGITransport(app=build_app(engine, settings, routes))
            async with (
                httpx2.AsyncClient(transport=transport) as http,
                openai.AsyncOpenAI(
                    api_key="k", base_url="http://localhost/v1", http_client=http, max_retries=0
                ) as client,
            ):
                yield client


def served(platform, body, answer_format=None):
    async def main():
        async with open_client(platform, answer_format) as client:
            return await body(client)

    return asyncio.run(main())


@pytest.mark.slow
def test_answers_are_those_of_the_offline_engine():
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=1)
    with LLM(MODEL, platform="cpu", **OPTIONS) as llm:
        offline = llm.generate([PROMPT], greedy, use_tqdm=False)[0]
        chatted = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0]

    async def body(client):
        create = client.completions.create
        options = {"model": "embedded", "temperature": 0, "max_tokens": 12}
        whole = await create(prompt=PROMPT, echo=True, logprobs=1, **options)
        stream = await create(prompt=PROMPT, stream=True, **options)
        pieces = [chunk.choices[0].text async for chunk in stream]
        chat = await client.chat.completions.create(messages=CHAT, **options)
        return whole, pieces, chat

    whole, pieces, chat = served("cpu", body)
    text = offline.outputs[0].text
    assert whole.choices[0].text == PROMPT + text
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert chat.choices[0].message.content == chatted.outputs[0].text
    prompt_logprobs = [
        position[token_id].logprob
        for token_id, position in zip(offline.prompt_token_ids[1:], offline.prompt_logprobs[1:], strict=True)
    ]
    seen = whole.choices[0].logprobs.token_logprobs
    assert seen[0] is None
    assert seen[1 : len(prompt_logprobs) + 1] == pytest.approx(prompt_logprobs, abs=1e-4)
    assert whole.usage.prompt_tokens == len(offline.prompt_token_ids)


@pytest.mark.slow
def test_forms_and_forced_calls_are_kept():
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    function = {"name": "toggle", "parameters": schema | {"additionalProperties": False}}
    tool = {"type": "function", "function": function}

    async def body(client):
        create = client.chat.completions.create
        options = {"model": "embedded", "messages": CHAT, "max_tokens": 60, "temperature": 0}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": function["parameters"]}}
        formed = await create(response_format=form, **options)
        choice = await create(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **options)
        required = await create(tools=[tool], tool_choice="required", parallel_tool_calls=False, **options)
        with pytest.raises(openai.BadRequestError):
            await create(
                response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#/no"}}}, **options
            )
        for stream in (False, True):
            conflict = {"structured_outputs": {"choice": ["yes", "no"]}, "allowed_token_ids": [5]}
            with pytest.raises(openai.BadRequestError) as caught:
                await create(extra_body=conflict, stream=stream, **options)
            assert caught.value.code == "no_token_left"
        after = await create(**options)
        return formed, choice, required, after

    formed, choice, required, after = served("cpu", body)
    assert isinstance(json.loads(formed.choices[0].message.content)["ok"], bool)
    assert choice.choices[0].message.content in ("yes", "no")
    call = required.choices[0].message.tool_calls[0]
    assert call.function.name == "toggle"
    assert isinstance(json.loads(call.function.arguments)["ok"], bool)
    assert required.choices[0].finish_reason == "tool_calls"
    assert after.choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_beside_a_form_tools_are_called_or_the_form_is_kept():
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema |= {"additionalProperties": False}
    tool = {"type": "function", "function": {"name": "toggle", "parameters": schema, "strict": True}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}

    async def answer(create, number):
        """Return the text and the arguments of the first call of a streamed answer."""
        messages = [{"role": "user", "content": f"Question {number}"}]
        text, arguments, reason = "", "", None
        async for chunk in await create(
            model="embedded", messages=messages, max_tokens=60, tools=[tool], response_format=form,
            parallel_tool_calls=False, stream=True,
        ):  # fmt: skip
            delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
            text += delta.content or ""
            arguments += "".join(call.function.arguments for call in delta.tool_calls or [])
        return text, arguments, reason

    async def body(client):
        return [await answer(client.chat.completions.create, number) for number in range(16)]

    answers = served("null", body, "hermes")
    assert {reason for _, _, reason in answers} == {"tool_calls", "stop"}
    for text, arguments, reason in answers:
        assert bool(text) != bool(arguments)
        assert isinstance(json.loads(text or arguments)["ok"], bool)
        assert reason == ("tool_calls" if arguments else "stop")


def test_many_prompts_and_a_client_that_leaves():
    async def body(client):
        ids = [[k + 1, 6, 7] for k in range(24)]
        options = {"model": "embedded", "max_tokens": 6, "seed": 5, "extra_body": {"ignore_eos": True}}
        together = await client.completions.create(prompt=ids, **options)
        alone = [(await client.completions.create(prompt=one, **options)).choices[0].text for one in ids[:4]]
        long = client.completions.create(
            model="embedded", prompt=[1, 2], max_tokens=200, extra_body={"ignore_eos": True}
        )
        leaver = asyncio.create_task(long)
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        after = await client.completions.create(prompt=ids[0], **options)
        return together, alone, after

    together, alone, after = served("null", body)
    assert [choice.text for choice in together.choices[:4]] == alone
    assert len(together.choices) == 24
    assert after.choices[0].text == alone[0]


def test_embeddings_are_those_of_the_offline_engine_and_generation_goes_on_beside_them():
    ids = [[k + 1, 6, 7, *range(9, 9 + 5 * k)] for k in range(24)]
    with LLM(MODEL, platform="null", **OPTIONS) as llm:
        offline = llm.embed([{"prompt_token_ids": one} for one in ids], use_tqdm=False)

    async def body(client):
        completion = client.completions.create(model="embedded", prompt=[1, 2], max_tokens=40, seed=5)
        embeddings = client.embeddings.create(model="embedded", input=ids)
        return await asyncio.gather(embeddings, completion)

    embeddings, completion = served("null", body)
    assert [entry.embedding for entry in embeddings.data] == [output.outputs.embedding for output in offline]
    assert embeddings.usage.prompt_tokens == sum(map(len, ids))
    assert completion.choices[0].finish_reason in ("stop", "length")
