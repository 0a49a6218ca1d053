"""No field of the official client's types is dropped in silence: it works, is refused by name, or is in the table."""

import asyncio
import typing

import pytest
from openai.types.responses import (
    easy_input_message_param,
    function_tool_param,
    input_token_count_params,
    response_create_params,
    response_format_text_json_schema_config_param,
    response_function_tool_call_param,
    response_input_item_param,
    response_input_text_param,
    response_output_message_param,
    response_output_refusal_param,
    response_output_text_param,
    response_reasoning_item_param,
    response_text_config_param,
    tool_choice_allowed_param,
    tool_choice_function_param,
)
from openai.types.shared_params import reasoning

from serving.hermes_model import MODEL, Served
from serving.http.calls import call
from zif.serving.responses import requests
from zif.serving.responses.requests import NO_EFFECT_CREATE, REFUSED_CREATE, CountInputTokens, CreateResponse

TYPES = [
    response_create_params.ResponseCreateParamsNonStreaming,
    response_create_params.ResponseCreateParamsStreaming,
]
WORKING = {
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "presence_penalty", "seed", "top_k",
    "frequency_penalty", "stream", "stream_options", "tools", "tool_choice", "parallel_tool_calls", "text",
    "reasoning", "metadata", "cache_salt",
}  # fmt: skip
VALUES = {"background": True, "store": True, "top_logprobs": 3, "truncation": "auto"}
"""A value to refuse, for fields that take some."""


COUNT_TYPES = [input_token_count_params.InputTokenCountParams]


@pytest.mark.parametrize(("struct", "types"), [(CreateResponse, TYPES), (CountInputTokens, COUNT_TYPES)])
def test_every_field_of_the_client_is_declared(struct, types):
    fields = set().union(*(typing.get_type_hints(kind) for kind in types))
    assert {"input", "model"} <= fields
    assert fields <= set(struct.__struct_fields__)


def test_every_declared_field_works_or_is_refused_or_is_in_the_table():
    no_effect = {name for name in NO_EFFECT_CREATE if "." not in name}
    assert set(CreateResponse.__struct_fields__) == WORKING | set(REFUSED_CREATE) | no_effect
    assert not (WORKING | no_effect) & set(REFUSED_CREATE)


@pytest.mark.parametrize("name", sorted(REFUSED_CREATE))
def test_refused_fields_are_named(folder, name):
    body = {"model": MODEL, "input": "x", name: VALUES.get(name, {})}
    answer = asyncio.run(call(Served(folder).app, "/v1/responses", body))
    assert (answer.status, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("name", sorted(name for name, refusal in REFUSED_CREATE.items() if refusal.neutral))
def test_their_neutral_values_pass(folder, name):
    body = {"model": MODEL, "input": "x", name: REFUSED_CREATE[name].neutral[0]}
    assert asyncio.run(call(Served(folder).app, "/v1/responses", body)).status == 200


@pytest.mark.parametrize(
    ("struct", "types"),
    [
        (
            requests.MessageItem,
            [
                easy_input_message_param.EasyInputMessageParam,
                response_input_item_param.Message,
                response_output_message_param.ResponseOutputMessageParam,
            ],
        ),
        (requests.InputText, [response_input_text_param.ResponseInputTextParam]),
        (requests.OutputText, [response_output_text_param.ResponseOutputTextParam]),
        (requests.Refused, [response_output_refusal_param.ResponseOutputRefusalParam]),
        (requests.FunctionCallItem, [response_function_tool_call_param.ResponseFunctionToolCallParam]),
        (requests.FunctionCallOutputItem, [response_input_item_param.FunctionCallOutput]),
        (requests.ReasoningItem, [response_reasoning_item_param.ResponseReasoningItemParam]),
        (requests.FunctionTool, [function_tool_param.FunctionToolParam]),
        (requests.NamedFunction, [tool_choice_function_param.ToolChoiceFunctionParam]),
        (requests.AllowedTools, [tool_choice_allowed_param.ToolChoiceAllowedParam]),
        (
            requests.JsonSchemaFormat,
            [response_format_text_json_schema_config_param.ResponseFormatTextJSONSchemaConfigParam],
        ),
        (requests.TextConfig, [response_text_config_param.ResponseTextConfigParam]),
        (requests.Reasoning, [reasoning.Reasoning]),
        (requests.StreamOptions, [response_create_params.StreamOptions]),
    ],
)
def test_nested_objects_declare_what_the_client_has_and_refuse_the_rest(struct, types):
    assert struct.__struct_config__.forbid_unknown_fields
    fields = set().union(*(typing.get_type_hints(kind) for kind in types))
    assert fields <= {*struct.__struct_encode_fields__, struct.__struct_config__.tag_field}


def test_the_table_is_served(folder):
    props = asyncio.run(call(Served(folder).app, "/props")).json()
    assert props["no_effect"]["/v1/responses"] == dict(NO_EFFECT_CREATE)
