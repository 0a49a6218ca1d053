"""Requests of the Messages and Responses APIs with odd values anywhere: answered or refused, never a fault of ours."""

import asyncio
import copy
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serving.fakes import Script
from serving.hermes_model import MODEL, PARAMETERS, Served, write_model
from serving.http.calls import call

MESSAGES = {
    "model": MODEL,
    "max_tokens": 20,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "r", "signature": "s"},
                {"type": "text", "text": "b", "citations": None},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "c", "is_error": False}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": PARAMETERS, "type": "custom"}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 10, "display": "omitted"},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
    "temperature": 1,
    "stream": True,
}
RESPONSES = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "c"}]},
    ],
    "instructions": "s",
    "tools": [{"type": "function", "name": "f", "parameters": PARAMETERS, "strict": True}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "metadata": {"k": "v"},
    "include": ["reasoning.encrypted_content"],
    "max_output_tokens": 20,
    "stream": True,
    "stream_options": {"include_obfuscation": False},
}
odd_values = st.one_of(
    st.sampled_from([None, True, 0, -1, 1, 2**31, -(2**63), 2**64, 0.5, 1e308]),
    st.sampled_from(["", "x", "\0", "\ud800", "none", "required"]),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], [None], [1], {"type": "text"}, {"type": None}, [{"type": "image"}]]),
    st.just({"a": {"b": []}}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hermes"))


def places_of(value, here=()):
    """Return the path of every value within a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, entry in entries for path in ((*here, key), *places_of(entry, (*here, key)))]


def changed(body, place, value):
    """Return a copy of a body with another value at one place."""
    body = copy.deepcopy(body)
    holder = body
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return body


@pytest.mark.parametrize(("path", "body"), [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)])
def test_as_they_are_they_are_answered(folder, path, body):
    answer = asyncio.run(call(Served(folder, Script(pieces=["a"])).app, path, body))
    assert answer.status == 200, answer.body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", MESSAGES),
        ("/v1/messages/count_tokens", {key: MESSAGES[key] for key in ("model", "messages", "system", "tools")}),
        ("/v1/responses", RESPONSES),
    ],
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 2**16), value=odd_values)
@example(number=0, value=2**70)
def test_odd_values_are_no_fault_of_the_server(folder, path, body, number, value):
    places = places_of(body)
    odd = json.dumps(changed(body, places[number % len(places)], value)).encode()
    served = Served(folder, Script(pieces=["a"]))
    answer = asyncio.run(call(served.app, path, odd, headers={"content-type": "application/json"}))
    served.chats.close()
    assert answer.status == 200 or 400 <= answer.status < 500, (answer.status, answer.body, odd)
    assert served.records[-1].failure is None or answer.status != 200
    assert len(served.engine.submitted) <= 1
