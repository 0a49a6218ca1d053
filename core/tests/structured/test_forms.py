"""What a form of an answer may be: exactly one field, within bounds, and its text."""

import json

import msgspec
import pytest

from zif import SamplingParams, StructuredOutput
from zif.contract import StructuredKind
from zif.contract.structured import (
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    MAX_GRAMMAR_CHARACTERS,
    MAX_GRAMMAR_LINES,
    MAX_REGEX_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_MEMBERS,
    MAX_SCHEMA_REFERENCES,
)
from zif.errors import RequestError


def nested(depth):
    schema = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"json": {"type": "object"}}, StructuredKind.JSON_SCHEMA),
        ({"json": "{}"}, StructuredKind.JSON_SCHEMA),
        ({"json_object": True}, StructuredKind.JSON_OBJECT),
        ({"regex": "a+"}, StructuredKind.REGEX),
        ({"choice": ["a", "b"]}, StructuredKind.CHOICE),
        ({"grammar": 'start: "a"'}, StructuredKind.GRAMMAR),
    ],
)
def test_exactly_one_field_says_the_kind(fields, kind):
    form = StructuredOutput(**fields)
    assert form.kind is kind
    assert hash(form) == hash(StructuredOutput(**fields))


def test_a_schema_and_its_text_are_one_form():
    schema = {"type": "object", "properties": {"ü": {"const": 1.5}}}
    assert json.loads(StructuredOutput(json=schema).text) == schema
    assert StructuredOutput(json=schema) == StructuredOutput(json=json.dumps(schema))


@pytest.mark.parametrize("fields", [{}, {"regex": "a", "json_object": True}, {"json": {}, "choice": ["a"]}])
def test_none_or_several_fields_are_refused(fields):
    with pytest.raises(RequestError, match="exactly one of json, json_object, regex, choice, grammar"):
        StructuredOutput(**fields)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"json": "{"}, "no JSON schema"),
        ({"json": "[1]"}, "list"),
        ({"json": {"const": {1}}}, "no JSON schema"),
        ({"json": {"const": float("nan")}}, "no JSON schema"),
        ({"json": '{"a":' * 100_000}, "characters|no JSON schema"),
        ({"json": "[" * 50_000}, "no JSON schema"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, f"deeper than {MAX_SCHEMA_DEPTH}"),
        ({"json": {str(i): {} for i in range(MAX_SCHEMA_MEMBERS + 1)}}, f"limit is {MAX_SCHEMA_MEMBERS}"),
        ({"json": {"anyOf": [{"$ref": "#"}] * (MAX_SCHEMA_REFERENCES + 1)}}, f"limit is {MAX_SCHEMA_REFERENCES}"),
        ({"json": {"const": "x" * MAX_SCHEMA_CHARACTERS}}, f"limit is {MAX_SCHEMA_CHARACTERS}"),
        ({"json": {"const": "\ud800"}, "regex": None}, None),
        ({"json": '{"const": "\ud800"}'}, "no character"),
        ({"regex": "a" * (MAX_REGEX_CHARACTERS + 1)}, f"limit is {MAX_REGEX_CHARACTERS}"),
        ({"regex": ""}, "empty"),
        ({"regex": "a\0"}, "NUL"),
        ({"regex": 5}, "must be text"),
        ({"regex": "\udc00"}, "no character"),
        ({"grammar": "a" * (MAX_GRAMMAR_CHARACTERS + 1)}, f"limit is {MAX_GRAMMAR_CHARACTERS}"),
        ({"grammar": "\n" * (MAX_GRAMMAR_LINES + 1)}, f"limit is {MAX_GRAMMAR_LINES}"),
        ({"regex": "a", "or_grammar": "\n" * (MAX_GRAMMAR_LINES + 1)}, "or_grammar has"),
        ({"regex": "a", "or_grammar": 5}, "or_grammar=5 must be text"),
        ({"or_grammar": 'start: "a"'}, "given nothing"),
        ({"choice": "ab"}, "list"),
        ({"choice": []}, "at least one"),
        ({"choice": ["a", ""]}, "empty"),
        ({"choice": ["a", 3]}, "must be text"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"limit is {MAX_CHOICES}"),
        ({"choice": ["a" * (MAX_CHOICE_CHARACTERS // 2), "b" * MAX_CHOICE_CHARACTERS]}, "limit is"),
        ({"json_object": "yes"}, "True or False"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_the_limit(fields, complaint):
    if complaint is None:
        StructuredOutput(**fields)
        return
    with pytest.raises(RequestError, match=complaint):
        StructuredOutput(**fields)


def test_the_deepest_schema_is_taken():
    assert StructuredOutput(json=nested(MAX_SCHEMA_DEPTH)).kind is StructuredKind.JSON_SCHEMA


def test_sampling_takes_a_form_and_nothing_else_for_one():
    form = StructuredOutput(regex="a")
    assert SamplingParams(structured=form, n=2).for_sample(1).structured is form
    with pytest.raises(RequestError, match="StructuredOutput"):
        SamplingParams(structured={"regex": "a"})
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(structured=form, ignore_eos=True)


@pytest.mark.parametrize(
    "fields", [{"json": {"type": "object"}}, {"json_object": True}, {"regex": "ü"}, {"choice": ["a", "b"]}]
)
def test_a_form_crosses_to_another_process_as_it_is(fields):
    sampling = SamplingParams(structured=StructuredOutput(**fields))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=SamplingParams) == sampling


def test_a_form_from_another_process_is_checked():
    encoded = msgspec.msgpack.encode({"structured": {"regex": "a" * (MAX_REGEX_CHARACTERS + 1)}})
    with pytest.raises(msgspec.ValidationError, match=f"limit is {MAX_REGEX_CHARACTERS}"):
        msgspec.msgpack.decode(encoded, type=SamplingParams)
