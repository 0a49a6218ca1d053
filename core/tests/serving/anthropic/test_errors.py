"""Failures of the Messages API: their status and form, and that what is refused is named."""

import asyncio

import anthropic
import pytest

from serving.anthropic.asked import ASK, TOOL, create, raw_events, refusal, said
from serving.fakes import Script
from serving.hermes_model import Served
from serving.http.calls import call
from zif.serving.answers import EngineUnavailableError, OverloadedError
from zif.serving.http.auth import parse_keys


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "kind", "status", "name"),
        [
            (OverloadedError("the queue is full", 2.0), anthropic.OverloadedError, 529, "overloaded_error"),
            (EngineUnavailableError("starting", 1.0), anthropic.ServiceUnavailableError, 503, "api_error"),
            (RuntimeError("boom"), anthropic.InternalServerError, 500, "api_error"),
        ],
    )
    @pytest.mark.parametrize("streamed", [False, True])
    def test_what_the_engine_raises(self, folder, error, kind, status, name, streamed):
        with pytest.raises(anthropic.APIStatusError) as caught:
            create(folder, Script(error=error), stream=streamed)
        assert isinstance(caught.value, kind)
        assert (caught.value.status_code, caught.value.type) == (status, name)
        assert "boom" not in caught.value.message
        if status == 529:
            assert caught.value.response.headers["retry-after"] == "2"

    @pytest.mark.parametrize(
        ("reason", "status", "name"), [("error", 500, "api_error"), ("abort", 408, "timeout_error")]
    )
    def test_answers_that_end_badly(self, folder, reason, status, name):
        script = Script(pieces=["a", "b"], finish_reason=reason)
        with pytest.raises(anthropic.APIStatusError) as caught:
            create(folder, script)
        assert (caught.value.status_code, caught.value.type) == (status, name)
        last, data = raw_events(folder, script)[-1]
        assert (last, data["error"]["type"]) == ("error", name)

    def test_an_unknown_model(self, folder):
        with pytest.raises(anthropic.NotFoundError) as caught:
            create(folder, model="other")
        assert caught.value.type == "not_found_error"

    def test_keys(self, folder):
        async def run(key):
            served = Served(folder, Script(pieces=["a"]), keys=parse_keys(["right-key-1"]))
            headers = {"x-api-key": key, "anthropic-version": "2023-06-01"}
            answer = await call(served.app, "/v1/messages", ASK, headers=headers)
            return answer, served.engine.submitted

        wrong, submitted = asyncio.run(run("wrong-key-1"))
        assert (wrong.status, wrong.json()["error"]["type"]) == (401, "authentication_error")
        assert not submitted
        right, (submission,) = asyncio.run(run("right-key-1"))
        assert right.status == 200
        assert submission.prompt.cache_salt
        assert submission.prompt.tenant

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"max_tokens": None}, "max_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"messages": []}, "messages"),
            ({"temperature": 3}, "temperature"),
            ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
            (said({"type": "image", "source": {}}), "'image'"),
            (said({"type": "document", "source": {}}), "'document'"),
            (said({"type": "server_tool_use"}), "'server_tool_use'"),
            (said({"type": "web_search_tool_result"}), "web_search_tool_result"),
            (said({"type": "text", "text": "x", "citations": [1]}), "citations"),
            (said({"type": "tool_result", "tool_use_id": "x"}), "'x'"),
            (said({"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}), "'image'"),
            (said({"type": "thinking", "thinking": "x"}), "role 'user'"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
            ({"tools": [{**TOOL, "input_examples": [{}]}]}, "input_examples"),
            ({"tools": [{**TOOL, "defer_loading": True}]}, "defer_loading"),
            ({"tools": [TOOL, TOOL]}, "more than once"),
            ({"tool_choice": {"type": "any"}}, "needs tools"),
            ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
            ({"thinking": {"type": "between_tools"}}, "between_tools"),
            ({"thinking": {"type": "enabled"}}, "budget_tokens"),
            (
                {"thinking": {"type": "enabled", "budget_tokens": 9}, "tool_choice": {"type": "any"}, "tools": [TOOL]},
                "thinking",
            ),
            ({"speed": "fast"}, "speed"),
            ({"chat_template": "{{ x }}"}, "chat_template"),
        ],
    )  # fmt: skip
    def test_what_is_refused_is_named(self, folder, changes, told):
        status, error = refusal(folder, changes, strict=True)
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert told in error["message"]

    def test_a_body_that_is_no_json(self, folder):
        answer = asyncio.run(
            call(Served(folder).app, "/v1/messages", b"{", headers={"content-type": "application/json"})
        )
        assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")
