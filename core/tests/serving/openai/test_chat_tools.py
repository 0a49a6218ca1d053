"""Tool calls, reasoning and forms in /v1/chat/completions, as the official client sees them."""

import json

import openai
import pytest

from serving.openai.served import CALL, HELLO, TIME, WEATHER, no_thinking, said, serve, write_model


@pytest.fixture
def tools_folder(tmp_path):
    return write_model(tmp_path)


def forced_schema(served):
    """The JSON schema in the grammar that the engine got."""
    return json.loads(served.sampling.structured.grammar.removeprefix("start: %json "))


class TestTools:
    def test_call_is_taken_apart(self, tools_folder):
        answer = serve(said("Let me see. ", *CALL), tools_folder).chat(**no_thinking(tools=[WEATHER]))
        choice = answer.choices[0]
        call = choice.message.tool_calls[0]
        assert choice.finish_reason == "tool_calls"
        assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
            "function", "get_weather", {"city": "Paris"},
        )  # fmt: skip
        assert len(call.id) == 9
        assert choice.message.content.strip() == "Let me see."

    def test_content_is_null_beside_a_call_alone(self, tools_folder):
        answer = serve(said(*CALL), tools_folder).chat(**no_thinking(tools=[WEATHER]))
        assert answer.choices[0].message.content is None

    def test_chunks_equal_the_whole(self, tools_folder):
        served = serve(said("Hm. ", *CALL), tools_folder)
        chunks = served.chat_chunks(**no_thinking(tools=[WEATHER]))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [call.id for call in calls if call.id is not None] == [calls[0].id]
        assert (calls[0].index, calls[0].type, calls[0].function.name) == (0, "function", "get_weather")
        assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"city": "Paris"}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    def test_without_tools_it_is_text(self, tools_folder):
        answer = serve(said(*CALL), tools_folder).chat(**no_thinking())
        assert answer.choices[0].message.content == "".join(CALL)
        assert answer.choices[0].finish_reason == "stop"

    def test_none_keeps_tools_out_of_the_prompt(self, tools_folder):
        served = serve(said("x"), tools_folder)
        body = {"messages": HELLO, "tools": [WEATHER]}
        with_tools = served.post("/v1/chat/completions/render", body).json()["prompt"]
        without = served.post("/v1/chat/completions/render", {**body, "tool_choice": "none"}).json()["prompt"]
        assert "get_weather" in with_tools
        assert "get_weather" not in without

    def test_call_cut_off_stays_as_far_as_it_came(self, tools_folder):
        answer = serve(said(*CALL), tools_folder).chat(**no_thinking(tools=[WEATHER], max_tokens=3))
        choice = answer.choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Pa'

    def test_only_one_call_without_parallel(self, tools_folder):
        served = serve(said(*CALL, *CALL), tools_folder)
        both = served.chat(**no_thinking(tools=[WEATHER]))
        one = served.chat(**no_thinking(tools=[WEATHER], parallel_tool_calls=False))
        assert len(both.choices[0].message.tool_calls) == 2
        assert len(one.choices[0].message.tool_calls) == 1

    def test_named_call_is_constrained_to_its_schema(self):
        served = serve(said('{"ci', 'ty": "Paris"}'))
        answer = served.chat(
            tools=[WEATHER, TIME], tool_choice={"type": "function", "function": {"name": "get_weather"}}
        )
        schema = forced_schema(served)
        assert schema["properties"] == WEATHER["function"]["parameters"]["properties"]
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Paris"}'
        assert answer.choices[0].finish_reason == "tool_calls"

    def test_required_calls_are_a_constrained_list(self):
        text = '[{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "a}]"}}]'
        served = serve(said(*text))
        answer = served.chat(tools=[WEATHER, TIME], tool_choice="required", max_tokens=400)
        calls = answer.choices[0].message.tool_calls
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("get_time", "{}"),
            ("get_weather", '{"city": "a}]"}'),
        ]
        assert forced_schema(served)["minItems"] == 1

    def test_allowed_tools_are_the_only_ones(self, tools_folder):
        served = serve(said("x"), tools_folder)
        choice = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
        }
        body = {"messages": HELLO, "tools": [WEATHER, TIME], "tool_choice": choice}
        text = served.post("/v1/chat/completions/render", body).json()["prompt"]
        assert "get_time" in text
        assert "get_weather" not in text

    def test_earlier_calls_reach_the_template_as_objects(self, tools_folder):
        call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        ]
        text = (
            serve(said("x"), tools_folder).post("/v1/chat/completions/render", {"messages": messages}).json()["prompt"]
        )
        assert "<tool_call>Rome</tool_call>" in text


class TestReasoning:
    def test_begun_by_the_prompt(self, tools_folder):
        answer = serve(said("Hm", "m", "</think>", "\n\nYes"), tools_folder).chat()
        message = answer.choices[0].message
        assert message.reasoning_content.strip() == "Hmm"
        assert message.content.strip() == "Yes"
        assert 2 <= answer.usage.completion_tokens_details.reasoning_tokens <= 3

    def test_streamed(self, tools_folder):
        chunks = serve(said("Hm", "m", "</think>", "\n\nYes"), tools_folder).chat_chunks()
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas).strip() == "Hmm"
        assert "".join(delta.content or "" for delta in deltas).strip() == "Yes"

    def test_left_out_on_request(self, tools_folder):
        answer = serve(said("Hmm", "</think>", "Yes"), tools_folder).chat(extra_body={"include_reasoning": False})
        assert getattr(answer.choices[0].message, "reasoning_content", None) is None
        assert answer.choices[0].message.content == "Yes"

    def test_effort_none_switches_it_off(self, tools_folder):
        served = serve(said("Yes"), tools_folder)
        assert served.chat(reasoning_effort="none").choices[0].message.content == "Yes"
        assert served.chat(reasoning_effort="low").choices[0].message.content is None

    def test_effort_is_refused_by_a_model_without(self):
        with pytest.raises(openai.BadRequestError) as caught:
            serve(said("x")).chat(reasoning_effort="high")
        assert caught.value.param == "reasoning_effort"

    def test_a_constrained_answer_does_not_think(self, tools_folder):
        answer = serve(said('{"a": 1}'), tools_folder).chat(response_format={"type": "json_object"})
        assert answer.choices[0].message.content == '{"a": 1}'


class TestForms:
    def test_json_schema(self):
        served = serve(said("{}"))
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        served.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert json.loads(served.sampling.structured.json) == schema

    def test_json_object_and_text(self):
        served = serve(said("{}"))
        served.chat(response_format={"type": "json_object"})
        assert served.sampling.structured.json_object
        served.chat(response_format={"type": "text"})
        assert served.sampling.structured is None

    @pytest.mark.parametrize(
        ("given", "name"),
        [({"regex": "a+"}, "regex"), ({"choice": ["a", "b"]}, "choice"), ({"grammar": 'start: "a"'}, "grammar")],
    )
    def test_structured_outputs(self, given, name):
        served = serve(said("a"))
        served.chat(extra_body={"structured_outputs": given})
        value = getattr(served.sampling.structured, name)
        assert (list(value) if name == "choice" else value) == given[name]
