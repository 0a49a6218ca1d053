"""Faults of /v1/chat/completions, and what clients do with it: leave, parse, stream with helpers."""

import asyncio
import json

import openai
import pydantic
import pytest

from serving.fakes import FakeEngine, Script
from serving.http.calls import Call
from serving.openai.served import CALL, HELLO, WEATHER, Served, no_thinking, said, serve, write_model
from zif.errors import RequestError
from zif.serving.answers import EngineUnavailableError, OverloadedError
from zif.serving.chat.service import ChatService
from zif.serving.http.app import build_app
from zif.serving.http.settings import ServeSettings
from zif.serving.openai.api import openai_routes


@pytest.fixture
def tools_folder(tmp_path):
    return write_model(tmp_path)


class TestFaults:
    def test_overload_is_429_also_for_streams(self):
        served = serve(Script(error=OverloadedError("the queue is full", 2.0)))
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                served.ask(
                    lambda client, stream=stream: client.chat.completions.create(
                        model="embedded", messages=HELLO, stream=stream
                    )
                )
            assert caught.value.response.headers["retry-after"] == "2"

    def test_engine_that_starts_is_503(self):
        served = Served(FakeEngine(said("x")))
        served.engine.model_info = None
        assert served.post("/v1/chat/completions", {"messages": HELLO}).status == 503

    def test_error_within_a_stream_ends_it(self):
        served = serve(said("a", "b", error=EngineUnavailableError("the engine was restarted"), error_at=1))
        with pytest.raises(openai.APIError, match="engine"):
            served.chat_chunks()

    @pytest.mark.parametrize(("reason", "status"), [("abort", 408), ("error", 500)])
    def test_ends_by_a_fault_are_errors(self, reason, status):
        answer = serve(said("a", finish_reason=reason)).post("/v1/chat/completions", {"messages": HELLO})
        assert answer.status == status
        assert answer.json()["error"]["code"] in ("generation_aborted", "generation_failed")

    def test_unknown_model_is_404(self):
        with pytest.raises(openai.NotFoundError) as caught:
            serve(said("x")).ask(lambda client: client.chat.completions.create(model="gpt-9", messages=HELLO))
        assert caught.value.code == "model_not_found"
        assert caught.value.param == "model"

    def test_prompt_that_fills_the_context_is_named(self):
        served = serve(said("x"), max_model_len=8)
        with pytest.raises(openai.BadRequestError) as caught:
            served.chat([{"role": "user", "content": "one two three four five six seven eight nine"}])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        assert served.engine.submitted == []

    def test_a_model_without_tokenizer_says_so_and_shows_no_path(self, tmp_path):
        served = serve(said("x"), tmp_path)
        for _ in range(2):
            answer = served.post("/v1/chat/completions", {"messages": HELLO})
            assert answer.status == 400
            assert "tokenizer" in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.body.decode()

    def test_a_model_without_tokenizer_completes_tokens(self, tmp_path):
        served = serve(said("", "", token_ids=[7, 9]), tmp_path)
        for fields in ({"prompt": "text"}, {"prompt": [5], "echo": True}, {"prompt": [5]}, {"prompt": ["text"]}):
            refused = served.post("/v1/completions", {"max_tokens": 2, **fields})
            assert refused.status == 400
            assert "return_token_ids=true" in refused.json()["error"]["message"]
        answer = served.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "return_token_ids": True})
        assert answer.json()["choices"][0]["token_ids"] == [7, 9]
        assert not served.engine.submitted[-1].sampling.detokenize

    def test_a_model_without_template_says_so(self, tmp_path):
        write_model(tmp_path, template="")
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        answer = serve(said("x"), tmp_path).post("/v1/chat/completions", {"messages": HELLO})
        assert answer.status == 400
        assert "chat template" in answer.json()["error"]["message"]

    def test_a_form_that_is_refused_never_reaches_the_engine(self):
        async def check(form):
            raise RequestError(f"{form.kind.value} takes too long to compile; simplify it")

        served = serve(said("x"))
        service = ChatService(served.engine, check_form=check)
        served.app = build_app(served.engine, served.settings, openai_routes(service))
        answer = served.post("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}})
        assert answer.status == 400
        assert "compile" in answer.json()["error"]["message"]
        assert served.engine.submitted == []


class TestClients:
    def test_a_client_that_leaves_a_stream_ends_it_in_the_engine(self):
        async def main():
            gates = [asyncio.Event() for _ in range(4)]
            gates[0].set()
            engine = FakeEngine(said("a", "b", "c", gates=gates))
            service = ChatService(engine)
            app = build_app(engine, ServeSettings(), openai_routes(service))
            request = Call("/v1/chat/completions", {"messages": HELLO, "stream": True})
            async with asyncio.timeout(10):
                task = asyncio.create_task(app(request.scope, request.receive, request.send))
                await request.chunk_came.wait()
                request.leave()
                await engine.submitted[0].ended.wait()
                await task
            service.close()
            return engine

        assert len(asyncio.run(main()).aborted) == 1

    def test_the_stream_helper_of_the_client_sees_calls(self, tools_folder):
        async def read(client):
            tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
            async with client.chat.completions.stream(
                model="embedded", messages=HELLO, tools=tools, extra_body=no_thinking()["extra_body"]
            ) as stream:
                kinds = [found.type async for found in stream]
                return kinds, await stream.get_final_completion()

        kinds, final = serve(said("Hm. ", *CALL), tools_folder).ask(read)
        assert {"chunk", "content.delta", "tool_calls.function.arguments.delta"} <= set(kinds)
        call = final.choices[0].message.tool_calls[0]
        assert call.function.parsed_arguments == {"city": "Paris"}

    def test_parsed_answers(self):
        class Answer(pydantic.BaseModel):
            ok: bool

        served = serve(said('{"ok": true}'))
        parsed = served.ask(
            lambda client: client.chat.completions.parse(model="embedded", messages=HELLO, response_format=Answer)
        )
        assert parsed.choices[0].message.parsed == Answer(ok=True)
        assert json.loads(served.sampling.structured.json)["properties"]["ok"] == {"title": "Ok", "type": "boolean"}

    def test_answers_are_valid_by_the_types_of_the_client(self, tools_folder):
        served = serve(said("Hm. ", *CALL), tools_folder)
        options = {"messages": HELLO, "tools": [WEATHER], "logprobs": True, "top_logprobs": 2}
        body = served.post("/v1/chat/completions", options).body
        openai.types.chat.ChatCompletion.model_validate_json(body, strict=True)
        stream = served.post("/v1/chat/completions", {**options, "stream": True}).body.decode()
        frames = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
        for frame in frames[:-1]:
            openai.types.chat.ChatCompletionChunk.model_validate_json(frame, strict=True)
        body = served.post("/v1/completions", {"prompt": "x", "logprobs": 1}).body
        openai.types.Completion.model_validate_json(body)

    def test_what_ended_is_in_the_record(self):
        seen = []
        served = serve(said("a", "b", num_cached_tokens=2))
        served.app.observers.append(seen.append)
        served.post("/v1/chat/completions", {"messages": HELLO, "n": 2, "max_tokens": 9})
        record = seen[-1]
        assert (record.model, record.num_output_tokens, record.num_samples, record.max_tokens) == ("embedded", 4, 2, 9)
        assert (record.num_cached_tokens, record.finish_reasons) == (2, ["stop", "stop"])
        assert record.num_prompt_tokens == len(served.prompt.token_ids)
        assert record.first_token_s <= record.last_token_s
