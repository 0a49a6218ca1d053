"""The Responses API through the official client: items whole and streamed, and what the model was asked."""

import asyncio

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.fakes import Script
from serving.hermes_model import CALL, MODEL, PARAMETERS, THOUGHTS, Served, cut_at, events_of, sampling_of
from serving.http.calls import Call, call
from zif.contract import StructuredOutput
from zif.serving.answers import EngineUnavailableError, OverloadedError

TOOL = {"type": "function", "name": "get_weather", "description": "W", "parameters": PARAMETERS, "strict": True}
ASK = {"model": MODEL, "input": "Weather in Oslo?"}
ANSWER = THOUGHTS + "Let me see.\n" + CALL
ARGUMENTS = '{"city": "Oslo", "days": [1, 2]}'


def create(folder, script=None, **changes):
    """Return the served model and the response that the client got."""

    async def run():
        served = Served(folder, script)
        async with served.openai() as client:
            return served, await client.responses.create(**{**ASK, **changes})

    return asyncio.run(run())


def stream(folder, script=None, **changes):
    """Return the response that the client put together from a stream."""

    async def run():
        served = Served(folder, script)
        async with served.openai() as client, client.responses.stream(**{**ASK, **changes}) as events:
            return await events.get_final_response()

    return asyncio.run(run())


def raw_events(folder, script=None, **changes):
    answer = asyncio.run(call(Served(folder, script).app, "/v1/responses", {**ASK, "stream": True, **changes}))
    assert answer.status == 200, answer.body
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")
    return events_of(answer.body)


def refusal(folder, changes, **settings):
    """Return the error that a request is answered with."""
    body = {key: value for key, value in {**ASK, **changes}.items() if value is not None}
    answer = asyncio.run(call(Served(folder, **settings).app, "/v1/responses", body))
    return answer.status, answer.json()["error"]


def without_ids(response):
    """Return what a response holds; ids and times are its own."""
    items = [
        {key: value for key, value in item.items() if key not in ("id", "call_id", "parsed_arguments")}
        for item in response.model_dump(exclude={"output": {"__all__": {"content": {"__all__": {"parsed"}}}}})["output"]
    ]
    return items, response.status, response.incomplete_details


def message(role, *parts):
    return {"type": "message", "role": role, "content": list(parts)}


class TestAnswers:
    def test_text(self, folder):
        served, response = create(folder, Script(pieces=["It", " rains."], num_cached_tokens=3))
        assert response.output_text == "It rains."
        assert (response.status, response.object, response.model) == ("completed", "response", MODEL)
        assert (response.error, response.incomplete_details) == (None, None)
        assert response.completed_at >= response.created_at > 0
        num_prompt = len(served.engine.submitted[0].prompt.token_ids)
        usage = response.usage
        assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (num_prompt, 2, num_prompt + 2)
        assert usage.input_tokens_details.cached_tokens == 3

    def test_reasoning_text_and_a_call_are_items_in_order(self, folder):
        _, response = create(folder, Script(pieces=[ANSWER]), tools=[TOOL])
        reasoning, text, call_item = response.output
        assert (reasoning.type, reasoning.content[0].text.strip()) == ("reasoning", "Look it up.")
        assert reasoning.summary == []
        assert (text.type, text.role, text.content[0].text.strip()) == ("message", "assistant", "Let me see.")
        assert (call_item.type, call_item.name, call_item.arguments) == ("function_call", "get_weather", ARGUMENTS)
        assert len({reasoning.id, text.id, call_item.id, call_item.call_id}) == 4
        assert {item.status for item in response.output} == {"completed"}
        assert response.status == "completed"

    def test_what_max_output_tokens_cuts_is_incomplete(self, folder):
        cut = CALL[: CALL.index(", 2]")]
        asked = {"tools": [TOOL], "max_output_tokens": 2}
        _, response = create(folder, Script(pieces=["a\n", cut, "x"]), **asked)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert [item.status for item in response.output] == ["completed", "incomplete"]
        assert response.output[1].arguments == '{"city": "Oslo", "days": [1'
        name, data = raw_events(folder, Script(pieces=["a\n", cut, "x"]), **asked)[-1]
        assert (name, data["response"]["status"]) == ("response.incomplete", "incomplete")
        assert data["response"]["output"][1]["arguments"] == response.output[1].arguments

    def test_a_response_says_what_was_asked(self, folder):
        asked = {
            "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9, "tools": [TOOL],
            "tool_choice": "none", "parallel_tool_calls": False, "metadata": {"k": "v"}, "user": "u", "store": False,
            "reasoning": {"effort": "low"}, "truncation": "disabled",
        }  # fmt: skip
        _, response = create(folder, Script(pieces=["a"]), **asked)
        told = response.model_dump()
        assert told["tools"][0]["parameters"] == PARAMETERS
        assert told["reasoning"]["effort"] == "low"
        assert {key: told[key] for key in asked if key not in ("tools", "reasoning", "store")} == {
            key: value for key, value in asked.items() if key not in ("tools", "reasoning", "store")
        }
        assert told["store"] is False

    def test_a_whole_response_has_the_fields_of_open_responses(self, folder):
        answer = asyncio.run(call(Served(folder, Script(pieces=["a"])).app, "/v1/responses", ASK))
        assert set(answer.json()) == {
            "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "instructions",
            "previous_response_id", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls",
            "text", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning",
            "user", "usage", "max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata",
            "safety_identifier", "prompt_cache_key",
        }  # fmt: skip


class TestStreams:
    def test_the_order_of_events(self, folder):
        events = raw_events(folder, Script(pieces=[THOUGHTS, "Let me", " see.", CALL]), tools=[TOOL])
        assert [name for name, _ in events] == [data["type"] for _, data in events]
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        assert [_short(data) for _, data in events] == [
            "created",
            "in_progress",
            "output_item.added 0 reasoning",
            "content_part.added 0 reasoning_text",
            "reasoning_text.delta 0",
            "reasoning_text.done 0",
            "content_part.done 0 reasoning_text",
            "output_item.done 0 reasoning",
            "output_item.added 1 message",
            "content_part.added 1 output_text",
            "output_text.delta 1",
            "output_text.delta 1",
            "output_text.done 1",
            "content_part.done 1 output_text",
            "output_item.done 1 message",
            "output_item.added 2 function_call",
            "function_call_arguments.delta 2",
            "function_call_arguments.done 2",
            "output_item.done 2 function_call",
            "completed",
        ]
        first, last = events[0][1]["response"], events[-1][1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        done = [data["item"] for _, data in events if data["type"] == "response.output_item.done"]
        assert last["output"] == done
        assert last["usage"]["output_tokens"] == 4

    def test_the_middle_of_a_short_stream(self, folder):
        events = [data for _, data in raw_events(folder, Script(pieces=["Hi"]))]
        item_id = events[2]["item"]["id"]
        where = {"item_id": item_id, "output_index": 0, "content_index": 0}
        part = {"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": item_id, "status": "completed", "role": "assistant", "content": [part]}
        assert events[2:-1] == [
            {
                "type": "response.output_item.added",
                "sequence_number": 2,
                "output_index": 0,
                "item": {**item, "status": "in_progress", "content": []},
            },
            {"type": "response.content_part.added", "sequence_number": 3, **where, "part": {**part, "text": ""}},
            {"type": "response.output_text.delta", "sequence_number": 4, **where, "delta": "Hi", "logprobs": []},
            {"type": "response.output_text.done", "sequence_number": 5, **where, "text": "Hi", "logprobs": []},
            {"type": "response.content_part.done", "sequence_number": 6, **where, "part": part},
            {"type": "response.output_item.done", "sequence_number": 7, "output_index": 0, "item": item},
        ]

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(places=st.lists(st.integers(0, 2**16), max_size=40), text=st.sampled_from([ANSWER, CALL + CALL, "x", " \n"]))
    def test_any_cut_of_the_answer_gives_the_same_response(self, folder, places, text):
        expected = without_ids(create(folder, Script(pieces=[text]), tools=[TOOL])[1])
        asked = {"tools": [TOOL], "max_output_tokens": 1000}
        script = Script(pieces=cut_at(text, places))
        assert without_ids(stream(folder, script, **asked)) == expected
        assert without_ids(create(folder, script, **asked)[1]) == expected

    def test_a_fault_in_the_middle_ends_with_a_failed_response(self, folder):
        script = Script(pieces=["a", "b"], error=EngineUnavailableError("restarted"), error_at=1)
        (_, error), (name, failed) = raw_events(folder, script)[-2:]
        assert (error["type"], error["code"]) == ("error", "server_error")
        assert (name, failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"]["code"] == "server_error"
        assert failed["response"]["output"][0]["status"] == "incomplete"

    def test_a_fault_in_the_middle_is_on_record(self, folder):
        script = Script(pieces=["a", "b"], error=EngineUnavailableError("restarted"), error_at=1)
        served = Served(folder, script)
        asyncio.run(call(served.app, "/v1/responses", {**ASK, "stream": True}))
        assert served.records[-1].failure == "unavailable"

    def test_a_client_that_leaves_aborts_the_request(self, folder):
        async def run():
            gates = [asyncio.Event(), asyncio.Event()]
            gates[0].set()
            served = Served(folder, Script(pieces=["a", "b"], gates=gates))
            request = Call("/v1/responses", {**ASK, "stream": True})
            task = asyncio.ensure_future(served.app(request.scope, request.receive, request.send))
            await asyncio.wait_for(request.chunk_came.wait(), 5)
            request.leave()
            await asyncio.wait_for(task, 5)
            return served.engine

        assert len(asyncio.run(run()).aborted) == 1


class TestRequests:
    def test_every_item_reaches_the_template(self, folder):
        served, _ = create(
            folder,
            instructions="Be brief.",
            tools=[TOOL],
            input=[
                message("developer", {"type": "input_text", "text": "Use tools."}),
                {"role": "user", "content": "Weather?"},
                {"type": "reasoning", "id": "rs_1", "summary": [],
                 "content": [{"type": "reasoning_text", "text": "Hm"}]},
                {**message("assistant", {"type": "output_text", "text": "I look.", "annotations": []}), "id": "msg_1",
                 "status": "completed"},
                {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
        )  # fmt: skip
        assert served.prompt().endswith(
            "<system>Be brief.\nUse tools.<user>Weather?<assistant><think>Hm</think>I look."
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
            "<tool>get_weather: rain<assistant>"
        ), served.prompt()

    def test_what_the_client_got_can_be_sent_back(self, folder):
        _, response = create(folder, Script(pieces=[ANSWER]), tools=[TOOL])
        output = {"type": "function_call_output", "call_id": response.output[2].call_id, "output": "rain"}
        items = [{"role": "user", "content": "Weather?"}, *response.output, output]
        served, _ = create(folder, input=items, tools=[TOOL])
        assert "<think>Look it up.</think>Let me see." in served.prompt()
        assert served.prompt().endswith("<tool>get_weather: rain<assistant>")

    def test_sampling_options(self, folder):
        served, _ = create(
            folder, max_output_tokens=7, temperature=0.5, top_p=0.9,
            extra_body={"presence_penalty": 1, "frequency_penalty": -1, "top_k": 4, "seed": 3},
        )  # fmt: skip
        sampling = sampling_of(served)
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.5, 0.9)
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.top_k, sampling.seed) == (1, -1, 4, 3)

    def test_without_a_limit_an_answer_goes_on_to_the_models_length(self, folder):
        assert sampling_of(create(folder)[0]).max_tokens is None

    def test_reasoning_goes_to_the_template(self, folder):
        served, response = create(folder, Script(pieces=["Hm", "</think>", "Yes"]), reasoning={"effort": "xhigh"})
        assert served.prompt().startswith("<effort>high</effort>")
        assert served.prompt().endswith("<assistant><think>")
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert not create(folder, reasoning={"effort": "none"})[0].prompt().endswith("<think>")

    @pytest.mark.parametrize(
        ("form", "structured"),
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, StructuredOutput(json_object=True)),
            ({"type": "json_schema", "name": "n", "schema": PARAMETERS}, StructuredOutput(json=PARAMETERS)),
        ],
    )  # fmt: skip
    def test_forms_constrain_the_answer(self, folder, form, structured):
        served, response = create(folder, Script(pieces=["{}"]), text={"format": form})
        assert sampling_of(served).structured == structured
        assert response.text.format.type == form["type"]
        assert response.output_text == "{}"

    def test_a_named_function_must_be_called(self, folder):
        choice = {"type": "function", "name": "get_weather"}
        served, response = create(folder, Script(pieces=['{"city"', ': "Oslo"}']), tools=[TOOL], tool_choice=choice)
        assert sampling_of(served).structured is not None
        assert (response.output[0].name, response.output[0].arguments) == ("get_weather", '{"city": "Oslo"}')

    def test_only_allowed_tools_are_shown(self, folder):
        other = {**TOOL, "name": "other"}
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
        served, response = create(folder, tools=[TOOL, other], tool_choice=choice)
        assert "other" in served.prompt()
        assert "get_weather" not in served.prompt()
        assert len(response.tools) == 2


class TestCounting:
    def test_it_is_the_length_of_the_prompt(self, folder):
        async def run():
            served = Served(folder)
            async with served.openai() as client:
                asked = {**ASK, "instructions": "Be brief.", "tools": [TOOL], "reasoning": {"effort": "low"}}
                counted = await client.responses.input_tokens.count(**asked)
                await client.responses.create(**asked)
                return counted, served.engine.submitted

        counted, submitted = asyncio.run(run())
        assert len(submitted) == 1
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == len(submitted[0].prompt.token_ids) > 10


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "status"),
        [
            (OverloadedError("the queue is full", 2.0), openai.RateLimitError, 429),
            (EngineUnavailableError("starting", 1.0), openai.InternalServerError, 503),
            (RuntimeError("boom"), openai.InternalServerError, 500),
        ],
    )
    @pytest.mark.parametrize("streamed", [False, True])
    def test_what_the_engine_raises(self, folder, error, kind, status, streamed):
        with pytest.raises(kind) as caught:
            create(folder, Script(error=error), stream=streamed)
        assert caught.value.status_code == status
        assert "boom" not in caught.value.message

    @pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 408)])
    def test_answers_that_end_badly(self, folder, reason, status):
        script = Script(pieces=["a", "b"], finish_reason=reason)
        with pytest.raises(openai.APIStatusError) as caught:
            create(folder, script)
        assert caught.value.status_code == status
        assert [name for name, _ in raw_events(folder, script)[-2:]] == ["error", "response.failed"]

    def test_an_unknown_model(self, folder):
        with pytest.raises(openai.NotFoundError):
            create(folder, model="other")

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"temperature": 3}, "temperature"),
            ({"metadata": {str(k): "v" for k in range(17)}}, "metadata"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
            ({"input": [{"type": "computer_call"}]}, "input[0].type"),
            ({"input": [{"type": ["x"]}]}, "input[0].type"),
            ({"input": [message("user", {"type": "input_image"})]}, "input[0].content[0]"),
            ({"input": [{"role": "user", "content": "x", "extra": 1}]}, "input[0]"),
            ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
            ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
            ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0]"),
            ({"tools": [{**TOOL, "name": "a\n"}]}, "tools[0]"),
            ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
            ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
            ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]}},
             "tool_choice.tools"),
            ({"include": ["message.output_text.logprobs"]}, "include"),
            ({"include": ["something"]}, "include[0]"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
            ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
            ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
            ({"chat_template": "{{ x }}"}, "chat_template"),
        ],
    )  # fmt: skip
    def test_what_is_refused_is_named(self, folder, changes, param):
        status, error = refusal(folder, changes, strict=True)
        assert (status, error["param"]) == (400, param), error

    @pytest.mark.parametrize(
        ("items", "told"),
        [
            ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "'c'"),
            ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}] * 2, "'c'"),
        ],
    )
    def test_results_answer_calls(self, folder, items, told):
        status, error = refusal(folder, {"input": items})
        assert status == 400
        assert told in error["message"]


def _short(data):
    """Return an event's type, index and what it is about."""
    about = data.get("item", data.get("part", {}))
    words = [data["type"].removeprefix("response."), data.get("output_index"), about.get("type")]
    return " ".join(str(word) for word in words if word is not None)
