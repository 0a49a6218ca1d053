"""The Messages API through the official client: what comes back, whole and streamed, and what the model was asked."""

import asyncio

import anthropic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.anthropic.asked import ANSWER, ASK, TOOL, WITH_TOOL, create, raw_events, stream
from serving.fakes import Script
from serving.hermes_model import CALL, MODEL, THOUGHTS, Served, cut_at, events_of
from serving.http.calls import Call
from zif.serving.answers import EngineUnavailableError


def without_ids(message):
    """Return what a message holds; ids are random."""
    dumped = message.model_dump()
    blocks = [{key: value for key, value in block.items() if key != "id"} for block in dumped["content"]]
    return blocks, dumped["stop_reason"], dumped["stop_sequence"], dumped["usage"]["output_tokens"]


class TestAnswers:
    def test_text(self, folder):
        served, message = create(folder, Script(pieces=["It", " rains."], num_cached_tokens=3))
        assert message.content[0].text == "It rains."
        assert (message.role, message.type, message.model, message.stop_reason) == (
            "assistant", "message", MODEL, "end_turn",
        )  # fmt: skip
        num_prompt = len(served.engine.submitted[0].prompt.token_ids)
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (num_prompt - 3, 3, 2)

    def test_thinking_text_and_a_call_are_blocks_in_order(self, folder):
        _, message = create(folder, Script(pieces=[ANSWER]), tools=[TOOL])
        thinking, text, tool_use = message.content
        assert (thinking.type, thinking.thinking.strip()) == ("thinking", "Look it up.")
        assert thinking.signature
        assert (text.type, text.text.strip()) == ("text", "Let me see.")
        assert (tool_use.name, tool_use.input) == ("get_weather", {"city": "Oslo", "days": [1, 2]})
        assert message.stop_reason == "tool_use"

    def test_omitted_thinking_leaves_its_signature(self, folder):
        _, message = create(folder, Script(pieces=[ANSWER]), thinking={"type": "adaptive", "display": "omitted"})
        assert (message.content[0].type, message.content[0].thinking) == ("thinking", "")
        assert message.content[0].signature

    @pytest.mark.parametrize(
        ("script", "reason", "sequence"),
        [
            (Script(pieces=["a"] * 101), "max_tokens", None),
            (Script(pieces=["a"], finish_reason="length"), "model_context_window_exceeded", None),
            (Script(pieces=["a"], stop_reason="END"), "stop_sequence", "END"),
            (Script(pieces=["a"], stop_reason=7), "end_turn", None),
        ],
    )
    def test_stop_reasons(self, folder, script, reason, sequence):
        _, message = create(folder, script)
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)

    def test_a_call_that_was_cut_off_has_what_was_written_of_it(self, folder):
        cut = CALL[: CALL.index(", 2]")]
        for message in (
            create(folder, Script(pieces=[cut], finish_reason="length"), **WITH_TOOL)[1],
            stream(folder, Script(pieces=[cut], finish_reason="length"), **WITH_TOOL),
        ):
            assert message.content[0].input["city"] == "Oslo"
            assert message.stop_reason == "model_context_window_exceeded"


class TestStreams:
    def test_the_order_of_events(self, folder):
        events = raw_events(folder, Script(pieces=[THOUGHTS, "Let me", " see.", CALL]), tools=[TOOL])
        assert [name for name, _ in events] == [data["type"] for _, data in events]
        assert [_short(data) for _, data in events] == [
            "message_start",
            "content_block_start 0 thinking",
            "content_block_delta 0 thinking_delta",
            "content_block_delta 0 signature_delta",
            "content_block_stop 0",
            "content_block_start 1 text",
            "content_block_delta 1 text_delta",
            "content_block_delta 1 text_delta",
            "content_block_stop 1",
            "content_block_start 2 tool_use",
            "content_block_delta 2 input_json_delta",
            "content_block_stop 2",
            "message_delta tool_use",
            "message_stop",
        ]
        first = events[0][1]["message"]
        assert (first["content"], first["stop_reason"]) == ([], None)
        assert events[-2][1]["usage"]["output_tokens"] == 4

    def test_the_whole_stream_of_a_short_text(self, folder):
        events = [data for _, data in raw_events(folder, Script(pieces=["Hi"], num_cached_tokens=1))]
        message = events[0]["message"]
        usage = {
            "input_tokens": message["usage"]["input_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
            "output_tokens": 1,
            "output_tokens_details": {"thinking_tokens": 0},
        }
        assert events[1:] == [
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": usage,
            },
            {"type": "message_stop"},
        ]

    def test_silence_is_filled_with_pings(self, folder):
        async def run():
            gate = asyncio.Event()
            served = Served(folder, Script(pieces=["Hi"], gates=[gate]), event_keep_alive_s=1)
            request = Call("/v1/messages", {**ASK, "stream": True})
            task = asyncio.ensure_future(served.app(request.scope, request.receive, request.send))
            await asyncio.wait_for(request.chunk_came.wait(), 5)
            gate.set()
            await asyncio.wait_for(task, 5)
            return events_of(request.answer.body)

        ping, start, *_ = asyncio.run(run())
        assert ping == ("ping", {"type": "ping"})
        assert start[0] == "message_start"

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(places=st.lists(st.integers(0, 2**16), max_size=40), text=st.sampled_from([ANSWER, CALL + CALL, "x", " \n"]))
    def test_any_cut_of_the_answer_gives_the_same_message(self, folder, places, text):
        expected = without_ids(create(folder, Script(pieces=[text]), **WITH_TOOL)[1])[:3]
        pieces = cut_at(text, places)
        assert without_ids(stream(folder, Script(pieces=pieces), **WITH_TOOL))[:3] == expected
        assert without_ids(create(folder, Script(pieces=pieces), **WITH_TOOL)[1])[:3] == expected

    def test_a_fault_in_the_middle_is_an_error_event(self, folder):
        script = Script(pieces=["a", "b"], error=EngineUnavailableError("the engine was restarted"), error_at=1)
        events = raw_events(folder, script)
        name, data = events[-1]
        assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
        with pytest.raises(anthropic.APIStatusError, match="the engine takes no requests"):
            stream(folder, script)

    def test_a_client_that_leaves_aborts_the_request(self, folder):
        async def run():
            gates = [asyncio.Event(), asyncio.Event()]
            gates[0].set()
            served = Served(folder, Script(pieces=["a", "b"], gates=gates))
            request = Call("/v1/messages", {**ASK, "stream": True})
            task = asyncio.ensure_future(served.app(request.scope, request.receive, request.send))
            await asyncio.wait_for(request.chunk_came.wait(), 5)
            request.leave()
            await asyncio.wait_for(task, 5)
            return served.engine

        assert len(asyncio.run(run()).aborted) == 1


def _short(data):
    """Return an event's type, index and what it is about."""
    about = data.get("content_block", data.get("delta", {}))
    words = [data["type"], data.get("index"), about.get("type", about.get("stop_reason"))]
    return " ".join(str(word) for word in words if word is not None)
