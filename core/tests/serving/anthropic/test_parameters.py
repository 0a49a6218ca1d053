"""No field of the official client's types is dropped in silence: it works, is refused by name, or is in the table."""

import asyncio
import typing

import pytest
from anthropic.types import (
    json_output_format_param,
    message_count_tokens_params,
    message_create_params,
    metadata_param,
    output_config_param,
    text_block_param,
    thinking_block_param,
    thinking_config_param,
    tool_choice_param,
    tool_param,
    tool_result_block_param,
    tool_use_block_param,
)
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params

from serving.hermes_model import MODEL, Served
from serving.http.calls import call
from zif.serving.anthropic import requests
from zif.serving.anthropic.api import AnthropicApi
from zif.serving.anthropic.requests import NO_EFFECT_CREATE, REFUSED_CREATE, CountTokens, CreateMessage

HEADERS = {"user_profile_id", "workspace_id", "betas"}
"""The client sends these as headers."""

CREATE_TYPES = [
    message_create_params.MessageCreateParamsNonStreaming,
    message_create_params.MessageCreateParamsStreaming,
    beta_create_params.MessageCreateParamsNonStreaming,
    beta_create_params.MessageCreateParamsStreaming,
]
COUNT_TYPES = [message_count_tokens_params.MessageCountTokensParams, beta_count_params.MessageCountTokensParams]
WORKING = {
    "model", "messages", "max_tokens", "system", "tools", "tool_choice", "thinking", "output_config", "stop_sequences",
    "stream", "temperature", "top_p", "top_k",
}  # fmt: skip
VALUES = {"speed": "fast"}
"""A value to refuse, for fields that take some."""


@pytest.mark.parametrize(("struct", "types"), [(CreateMessage, CREATE_TYPES), (CountTokens, COUNT_TYPES)])
def test_every_field_of_the_client_is_declared(struct, types):
    fields = set().union(*(typing.get_type_hints(kind) for kind in types))
    assert {"messages", "model"} <= fields
    assert fields - HEADERS <= set(struct.__struct_fields__)


def test_every_declared_field_works_or_is_refused_or_is_in_the_table():
    assert set(CreateMessage.__struct_fields__) == WORKING | set(REFUSED_CREATE) | {
        name for name in NO_EFFECT_CREATE if "." not in name
    }
    assert not WORKING & set(REFUSED_CREATE)


@pytest.mark.parametrize("name", sorted(REFUSED_CREATE))
def test_refused_fields_are_named(folder, name):
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], name: VALUES.get(name, {})}
    answer = asyncio.run(call(Served(folder).app, "/v1/messages", body))
    assert answer.status == 400
    assert repr(name) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("struct", "types"),
    [
        (requests.TextBlock, [text_block_param.TextBlockParam]),
        (requests.ThinkingBlock, [thinking_block_param.ThinkingBlockParam]),
        (requests.ToolUseBlock, [tool_use_block_param.ToolUseBlockParam]),
        (requests.ToolResultBlock, [tool_result_block_param.ToolResultBlockParam]),
        (requests.Tool, [tool_param.ToolParam]),
        (requests.ToolChoice, list(typing.get_args(tool_choice_param.ToolChoiceParam))),
        (requests.Thinking, list(typing.get_args(thinking_config_param.ThinkingConfigParam))),
        (requests.OutputConfig, [output_config_param.OutputConfigParam]),
        (requests.JsonFormat, [json_output_format_param.JSONOutputFormatParam]),
        (requests.Metadata, [metadata_param.MetadataParam]),
    ],
)
def test_nested_objects_refuse_what_they_do_not_declare(struct, types):
    """A field of the client's that is not declared is refused by its name, because unknown keys are."""
    assert struct.__struct_config__.forbid_unknown_fields
    fields = set().union(*(typing.get_type_hints(kind) for kind in types))
    declared = set(struct.__struct_fields__) | {struct.__struct_config__.tag_field}
    assert fields - declared <= {"input_examples"}


def test_the_table_is_served(folder):
    served = Served(folder)
    props = asyncio.run(call(served.app, "/props")).json()
    assert props["no_effect"]["/v1/messages"] == dict(NO_EFFECT_CREATE)
    assert all(route.no_effect for route in AnthropicApi(served.chats).routes())
