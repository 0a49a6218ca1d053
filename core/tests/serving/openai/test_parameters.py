"""No field of the SDK's request types is dropped in silence: it works, it is refused by name, or it is listed."""

import typing

import openai
import pytest
from openai.types import completion_create_params as completion_types
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_types
from openai.types.shared_params import response_format_json_schema

from serving.openai.served import HELLO, WEATHER, said, serve
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.chat_request import CHAT_NO_EFFECT, CHAT_REFUSED, ChatRequest
from zif.serving.openai.completion_request import COMPLETION_NO_EFFECT, COMPLETION_REFUSED, CompletionRequest
from zif.serving.openai.fields import StreamOptions

CHAT_WORKS = {
    "messages": HELLO,
    "model": "embedded",
    "frequency_penalty": 0.5,
    "logit_bias": {"1": 1},
    "logprobs": True,
    "max_completion_tokens": 4,
    "max_tokens": 4,
    "n": 2,
    "parallel_tool_calls": True,
    "presence_penalty": 0.5,
    "reasoning_effort": "none",
    "response_format": {"type": "json_object"},
    "seed": 3,
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": "auto",
    "tools": [WEATHER],
    "top_logprobs": 1,
    "top_p": 0.5,
}
"""Fields that do something, each tested in `test_chat`, with a value that is taken."""

COMPLETION_WORKS = {
    "model": "embedded",
    "prompt": "x",
    "best_of": 1,
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"1": 1},
    "logprobs": 1,
    "max_tokens": 3,
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 1,
    "stop": "x",
    "stream": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
}

REFUSED_VALUES = {
    "audio": {"voice": "alloy", "format": "wav"},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
    "suffix": "end",
}

NO_EFFECT_VALUES = {
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
    "user": "u",
}


def sdk_fields(*types):
    return {name for kind in types for name in typing.get_type_hints(kind)}


CHAT_FIELDS = sdk_fields(chat_types.CompletionCreateParamsNonStreaming, chat_types.CompletionCreateParamsStreaming)
COMPLETION_FIELDS = sdk_fields(
    completion_types.CompletionCreateParamsNonStreaming, completion_types.CompletionCreateParamsStreaming
)


class TestEveryField:
    def test_chat_fields_are_classified(self):
        assert set(CHAT_WORKS) | (CHAT_FIELDS & (set(CHAT_REFUSED) | set(CHAT_NO_EFFECT))) == CHAT_FIELDS

    def test_completion_fields_are_classified(self):
        known = set(COMPLETION_REFUSED) | set(COMPLETION_NO_EFFECT)
        assert set(COMPLETION_WORKS) | (COMPLETION_FIELDS & known) == COMPLETION_FIELDS

    def test_chat_fields_are_declared(self):
        assert set(ChatRequest.__struct_fields__) >= CHAT_FIELDS

    def test_completion_fields_are_declared(self):
        assert set(CompletionRequest.__struct_fields__) >= COMPLETION_FIELDS

    def test_stream_options_are_declared(self):
        assert set(StreamOptions.__struct_fields__) >= sdk_fields(ChatCompletionStreamOptionsParam)

    @pytest.mark.parametrize("name", sorted(CHAT_FIELDS & set(CHAT_REFUSED)))
    def test_refused_ones_are_named(self, name):
        answer = serve(said("x")).post("/v1/chat/completions", {"messages": HELLO, name: REFUSED_VALUES[name]})
        assert answer.status == 400
        assert answer.json()["error"]["param"] == name
        assert answer.json()["error"]["code"] == "unsupported_parameter"

    @pytest.mark.parametrize("name", sorted(CHAT_FIELDS & set(CHAT_NO_EFFECT)))
    def test_listed_ones_pass_and_are_shown_at_props(self, name):
        served = serve(said("x"))
        assert served.post("/v1/chat/completions", {"messages": HELLO, name: NO_EFFECT_VALUES[name]}).status == 200
        assert f'"{name}"' in served.get("/props").body.decode()

    @pytest.mark.parametrize("name", sorted(set(CHAT_WORKS) - {"stream_options", "top_logprobs"}))
    def test_working_ones_are_taken(self, name):
        body = {"messages": HELLO, name: CHAT_WORKS[name]}
        assert serve(said("x")).post("/v1/chat/completions", body).status == 200

    @pytest.mark.parametrize("name", sorted(set(COMPLETION_WORKS) - {"stream_options"}))
    def test_working_ones_of_completions_are_taken(self, name):
        body = {"prompt": "x", name: COMPLETION_WORKS[name]}
        assert serve(said("x")).post("/v1/completions", body).status == 200

    @pytest.mark.parametrize("name", sorted({*CHAT_FIELDS, *COMPLETION_FIELDS} - {"messages", "prompt"}))
    def test_null_is_as_if_left_out(self, name):
        served = serve(said("x"))
        if name in CHAT_FIELDS:
            assert served.post("/v1/chat/completions", {"messages": HELLO, name: None}).status == 200
        if name in COMPLETION_FIELDS:
            assert served.post("/v1/completions", {"prompt": "x", name: None}).status == 200


def names_of(kind):
    return set(typing.get_type_hints(kind))


NESTED = {
    openai.types.chat.ChatCompletionSystemMessageParam: {"role", "content", "name"},
    openai.types.chat.ChatCompletionDeveloperMessageParam: {"role", "content", "name"},
    openai.types.chat.ChatCompletionUserMessageParam: {"role", "content", "name"},
    openai.types.chat.ChatCompletionToolMessageParam: {"role", "content", "tool_call_id"},
    openai.types.chat.ChatCompletionAssistantMessageParam: {
        "role", "content", "name", "refusal", "tool_calls",
        "audio", "function_call",  # refused
    },
    openai.types.chat.ChatCompletionContentPartTextParam: {"type", "text", "prompt_cache_breakpoint"},
    openai.types.chat.ChatCompletionContentPartRefusalParam: {"type", "refusal"},
    openai.types.chat.ChatCompletionFunctionToolParam: {"type", "function"},
    openai.types.chat.ChatCompletionMessageFunctionToolCallParam: {"id", "type", "function"},
    openai.types.shared_params.FunctionDefinition: {"name", "description", "parameters", "strict"},
    response_format_json_schema.JSONSchema: {"name", "description", "schema", "strict"},
}  # fmt: skip
"""What `messages.py` knows of nested types: a field that a new SDK adds must be decided on there."""

UNIONS = {
    openai.types.chat.ChatCompletionMessageParam: 6,  # five roles, and functions, which are refused
    openai.types.chat.ChatCompletionContentPartParam: 4,  # text; images, sound and files are refused
    openai.types.chat.ChatCompletionToolUnionParam: 2,  # functions; custom ones are refused
    openai.types.chat.ChatCompletionToolChoiceOptionParam: 4,  # a word, allowed tools, a function; custom is refused
    chat_types.ResponseFormat: 3,
}


class TestNestedFields:
    @pytest.mark.parametrize("kind", NESTED, ids=lambda kind: kind.__name__)
    def test_are_classified(self, kind):
        assert names_of(kind) == NESTED[kind]

    @pytest.mark.parametrize("union", UNIONS, ids=[str(k) for k in range(len(UNIONS))])
    def test_no_kind_was_added(self, union):
        assert len(typing.get_args(union)) == UNIONS[union]

    def test_refusals_of_the_assistant_are_what_it_said(self):
        served = serve(said("x"))
        parts = [{"type": "refusal", "refusal": "I will not"}]
        for message in ({"refusal": "I will not"}, {"content": parts}):
            messages = [*HELLO, {"role": "assistant", **message}, *HELLO]
            answer = served.post("/v1/chat/completions/render", {"messages": messages})
            assert "I will not" in answer.json()["prompt"]


class TestUnknownFields:
    def test_are_named_in_a_header(self):
        answer = serve(said("x")).post("/v1/chat/completions", {"messages": HELLO, "temprature": 1})
        assert answer.status == 200
        assert any("temprature" in value for value in answer.headers.values())

    def test_are_refused_in_strict_mode(self):
        served = serve(said("x"), settings=ServeSettings(strict=True))
        answer = served.post("/v1/chat/completions", {"messages": HELLO, "temprature": 1})
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "temprature"


BAD_CHATS = [
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": [""]}),
    ("logit_bias", {"logit_bias": {str(k): 1 for k in range(1025)}}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"top_logprobs": 1}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 1, "max_completion_tokens": 2}),
    ("messages", {"messages": []}),
    ("messages", {"messages": HELLO * 2049}),
    ("messages", {"messages": "Hello"}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": "function", "name": "f", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
    ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
    ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}),
    ("messages[0].tool_calls[0]", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [5]}]}),
    ("messages[0].function_call", {"messages": [{"role": "assistant", "content": "x", "function_call": {}}]}),
    ("messages[0].audio", {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]}),
    ("messages[0].name", {"messages": [{"role": "user", "content": "x", "name": 5}]}),
    ("tools[0].type", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tools[0].function.code", {"tools": [{"type": "function", "function": {"name": "a", "code": "x"}}]}),
    ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}),
    ("tools", {"tools": [WEATHER] * 129}),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": "maybe"}),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "custom"}}),
    ("tool_choice.allowed_tools", {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
    ("structured_outputs", {"structured_outputs": {"structural_tag": "x"}}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ("prompt_logprobs", {"stream": True, "prompt_logprobs": 1}),
    ("add_special_tokens", {"add_special_tokens": True}),
    ("chat_template", {"chat_template": "{{ 7 * 7 }}"}),
    ("guided_json", {"guided_json": {"type": "object"}}),
    ("metadata", {"metadata": {str(k): "v" for k in range(17)}}),
    ("bad_words", {"bad_words": ["x"] * 257}),
    ("bad_words", {"bad_words": [" "]}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 0}),
]


class TestBadInput:
    @pytest.mark.parametrize(("param", "fields"), BAD_CHATS, ids=[str(k) for k in range(len(BAD_CHATS))])
    def test_is_refused_and_named(self, param, fields):
        served = serve(said("x"))
        answer = served.post("/v1/chat/completions", {"messages": HELLO, **fields})
        assert answer.status == 400, answer.body
        error = answer.json()["error"]
        assert (error["param"] or "").startswith(param), error
        assert served.engine.submitted == []

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": [WEATHER, WEATHER]},
            {"tool_choice": "required"},
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"structured_outputs": {}},
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            {"structured_outputs": {"regex": "a" * 20000}},
            {"ignore_eos": True, "response_format": {"type": "json_object"}},
            {"min_tokens": 9, "max_tokens": 3},
            {"continue_final_message": True, "add_generation_prompt": True},
            {"messages": [{"role": "user", "content": "x" * 2_000_000}]},
            {"messages": [{"role": "user", "content": "\ud800"}]},
        ],
    )
    def test_what_does_not_go_together_is_refused(self, fields):
        served = serve(said("x"))
        answer = served.post("/v1/chat/completions", {"messages": HELLO, **fields})
        assert answer.status == 400, answer.body
        assert answer.json()["error"]["message"]
        assert served.engine.submitted == []
