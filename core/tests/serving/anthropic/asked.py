"""What tests of the Messages API ask, and what they get, whole and streamed."""

import asyncio

from serving.hermes_model import CALL, MODEL, PARAMETERS, THOUGHTS, Served, events_of
from serving.http.calls import call

TOOL = {"name": "get_weather", "description": "The weather", "input_schema": PARAMETERS}
ASK = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "Weather in Oslo?"}]}
WITH_TOOL = {**ASK, "tools": [TOOL]}
ANSWER = THOUGHTS + "Let me see.\n" + CALL


def create(folder, script=None, **changes):
    """Return the served model and the message that the client got."""

    async def run():
        served = Served(folder, script)
        async with served.anthropic() as client:
            return served, await client.messages.create(**{**ASK, **changes})

    return asyncio.run(run())


def stream(folder, script=None, **changes):
    """Return the message that the client put together from a stream."""

    async def run():
        served = Served(folder, script)
        async with served.anthropic() as client, client.messages.stream(**{**ASK, **changes}) as events:
            return await events.get_final_message()

    return asyncio.run(run())


def raw_events(folder, script=None, **changes):
    answer = asyncio.run(call(Served(folder, script).app, "/v1/messages", {**ASK, "stream": True, **changes}))
    assert answer.status == 200, answer.body
    return events_of(answer.body)


def refusal(folder, changes, path="/v1/messages", **settings):
    """Return the error that a request is answered with."""
    body = {key: value for key, value in {**ASK, **changes}.items() if value is not None}
    answer = asyncio.run(call(Served(folder, **settings).app, path, body))
    assert answer.json()["type"] == "error"
    return answer.status, answer.json()["error"]


def said(block):
    """Return the change of a request whose user sends one block."""
    return {"messages": [{"role": "user", "content": [block]}]}
