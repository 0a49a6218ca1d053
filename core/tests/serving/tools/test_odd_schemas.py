"""Strict schemas with odd values anywhere, in every answer format: answered or refused, never a fault of the server."""

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.fakes import FakeEngine, Script
from serving.hermes_model import MODEL, replace_info, write_model
from serving.http.calls import call
from serving.test_odd_requests import changed, odd_values, places_of
from zif.parsing.formats import format_names
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"$ref": "#/$defs/a"},
        "b": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/b"}]},
        "c": {"type": ["string", "null"], "description": "d"},
        "d": {"enum": ["x", "y"]},
        "e": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["a", "d"],
    "additionalProperties": False,
    "$defs": {"a": {"type": "integer"}, "b": {"oneOf": [{"const": "x"}, {"type": "null"}]}},
    "definitions": {},
}
PLACES = places_of(SCHEMA)
CHOICES = ["auto", "required", {"type": "function", "function": {"name": "f"}}]
FORM = {"type": "json_object"}


@pytest.fixture(scope="module", params=format_names())
def app(request, tmp_path_factory):
    engine = FakeEngine(Script(pieces=["a"]), info=replace_info(write_model(tmp_path_factory.mktemp("model"))))
    chats = ChatService(engine, format_name=request.param)
    yield build_app(engine, ServeSettings(), openai_routes(chats))
    chats.close()


@settings(deadline=None, max_examples=10)
@given(place=st.sampled_from(PLACES), value=odd_values, choice=st.sampled_from(CHOICES), beside_form=st.booleans())
@example(place=("required",), value=[1], choice="auto", beside_form=False)
@example(place=("required",), value=5, choice="auto", beside_form=False)
@example(place=("required", 0), value=["a"], choice="auto", beside_form=False)
@example(place=("properties",), value=["a"], choice="auto", beside_form=False)
@example(place=("properties",), value="ab", choice="auto", beside_form=True)
@example(place=("$defs", "a"), value=None, choice="auto", beside_form=False)
@example(place=("$defs", "b"), value=5, choice="auto", beside_form=True)
def test_odd_values_in_a_strict_schema_are_no_fault_of_the_server(app, place, value, choice, beside_form):
    function = {"name": "f", "strict": True, "parameters": changed(SCHEMA, place, value)}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": choice,
        **({"response_format": FORM} if beside_form else {}),
    }
    answer = asyncio.run(call(app, "/v1/chat/completions", body))
    assert answer.status in (200, 400), (answer.status, answer.body)
    if answer.status == 400:
        error = answer.json()["error"]
        assert "tools" in error["message"] or error["code"] == "invalid_json", answer.body
