"""Keys of nested objects: none is dropped in silence."""

import pytest

from serving.openai.served import HELLO, WEATHER, said, serve
from zif.contract import StructuredOutput

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}


def with_key(value, *place):
    """Return a copy of nested objects with a key that nobody knows, at a place within."""
    if not place:
        return {**value, "zz": 1}
    if isinstance(value, list):
        return [with_key(entry, *place[1:]) if index == place[0] else entry for index, entry in enumerate(value)]
    return {**value, place[0]: with_key(value[place[0]], *place[1:])}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("response_format", with_key({"type": "text"}), "response_format.zz"),
        ("response_format", with_key({"type": "json_object"}), "response_format.zz"),
        ("response_format", with_key(FORMAT), "response_format.zz"),
        ("response_format", with_key(FORMAT, "json_schema"), "response_format.json_schema.zz"),
        ("response_format", {**FORMAT, "schema": SCHEMA}, "response_format.schema"),
        ("tools", [with_key(WEATHER)], "tools[0].zz"),
        ("tools", [with_key(WEATHER, "function")], "tools[0].function.zz"),
        ("tool_choice", with_key(NAMED), "tool_choice.zz"),
        ("tool_choice", with_key(NAMED, "function"), "tool_choice.function.zz"),
        ("tool_choice", with_key(ALLOWED), "tool_choice.zz"),
        ("tool_choice", with_key(ALLOWED, "allowed_tools"), "tool_choice.allowed_tools.zz"),
        (
            "tool_choice",
            with_key(ALLOWED, "allowed_tools", "tools", 0, "function"),
            "tool_choice.allowed_tools.tools[0].function.zz",
        ),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "a", "zz": 1}]}],
            "messages[0].content[0].zz",
        ),
        ("prompt_cache_options", {"zz": 1}, "prompt_cache_options.zz"),
        ("stream_options", {"zz": 1}, "stream_options.zz"),
        ("structured_outputs", {"zz": 1}, "structured_outputs.zz"),
    ],
)
def test_a_key_that_nobody_reads_is_named(field, value, named):
    served = serve(said("x"))
    body = {"messages": HELLO, "tools": [WEATHER], field: value}
    answer = served.post("/v1/chat/completions", body)
    assert (answer.status, answer.json()["error"]["param"]) == (400, named)
    assert "zz" in answer.json()["error"]["message"] or named.endswith("schema")
    assert not served.engine.submitted


def test_keys_without_a_value_ask_for_nothing():
    served = serve(said("{}"))
    answer = served.post(
        "/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "text", "json_schema": None}}
    )
    assert answer.status == 200, answer.body


@pytest.mark.parametrize(("path", "prompt"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
def test_any_object_may_have_a_schema(path, prompt):
    served = serve(said("{}"))
    body = {
        prompt: HELLO if prompt == "messages" else "a",
        "response_format": {"type": "json_object", "schema": SCHEMA},
    }
    assert served.post(path, body).status == 200
    assert served.sampling.structured == StructuredOutput(json=SCHEMA)
    body["response_format"]["schema"] = "x"
    assert served.post(path, body).json()["error"]["param"] == "response_format.schema"
