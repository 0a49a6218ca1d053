"""Requests of the Messages API through the official client: what the model is asked."""

import asyncio

from serving.anthropic.asked import ANSWER, ASK, TOOL, WITH_TOOL, create
from serving.fakes import Script
from serving.hermes_model import MODEL, PARAMETERS, Served, sampling_of
from zif.contract import StructuredOutput


class TestRequests:
    def test_every_block_reaches_the_template(self, folder):
        served, _ = create(
            folder,
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            tools=[TOOL],
            messages=[
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm", "signature": "s"},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Oslo"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "down"}],
                         "is_error": True},
                        {"type": "text", "text": "And?"},
                    ],
                },
            ],
        )  # fmt: skip
        prompt = served.prompt()
        tool = '<tool>{"type": "function", "function": {"name": "get_weather"'
        assert prompt.startswith(tool), prompt
        assert prompt.endswith(
            "<system>Be brief.<user>Weather?<assistant><think>Hm</think>I look."
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
            "<tool>get_weather: Error: down<user>And?<assistant>"
        ), prompt

    def test_what_the_client_got_can_be_sent_back(self, folder):
        served, message = create(folder, Script(pieces=[ANSWER]), tools=[TOOL])
        call_id = message.content[2].id
        messages = [
            *ASK["messages"],
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "rain"}]},
        ]
        served, _ = create(folder, messages=messages, tools=[TOOL])
        assert "<think>Look it up.</think>Let me see." in served.prompt()
        assert served.prompt().endswith("<tool>get_weather: rain<assistant>")

    def test_neighbours_of_one_role_become_one_message(self, folder):
        served, _ = create(folder, messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
        assert served.prompt().endswith("<user>a\nb<assistant>")

    def test_a_last_message_of_the_assistant_is_continued(self, folder):
        served, _ = create(folder, messages=[*ASK["messages"], {"role": "assistant", "content": "It is"}])
        assert served.prompt().endswith("<assistant>It is")

    def test_sampling_options(self, folder):
        served, _ = create(
            folder, max_tokens=7, stop_sequences=["END"],
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 4},
        )  # fmt: skip
        sampling = sampling_of(served)
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (
            7, 0.5, 0.9, 4, ["END"],
        )  # fmt: skip

    def test_thinking_and_effort_go_to_the_template(self, folder):
        thinking = {"type": "enabled", "budget_tokens": 50}
        served, message = create(
            folder, Script(pieces=["Hm", "</think>", "Yes"]), thinking=thinking, output_config={"effort": "max"}
        )
        assert served.prompt().startswith("<effort>high</effort>")
        assert served.prompt().endswith("<assistant><think>")
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert not create(folder, thinking={"type": "disabled"})[0].prompt().endswith("<think>")

    def test_an_output_format_constrains_the_answer(self, folder):
        config = {"format": {"type": "json_schema", "schema": PARAMETERS}}
        served, message = create(folder, Script(pieces=['{"city": "Oslo"}']), output_config=config)
        assert sampling_of(served).structured == StructuredOutput(json=PARAMETERS)
        assert message.content[0].text == '{"city": "Oslo"}'

    def test_a_named_tool_must_be_called(self, folder):
        choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
        served, message = create(folder, Script(pieces=['{"city"', ': "Oslo"}']), **WITH_TOOL, tool_choice=choice)
        assert sampling_of(served).structured is not None
        assert (message.content[0].input, message.stop_reason) == ({"city": "Oslo"}, "tool_use")

    def test_the_client_of_the_beta_is_answered(self, folder):
        async def run():
            served = Served(folder, Script(pieces=["Hm</think>Hi"]))
            async with served.anthropic() as client:
                return await client.beta.messages.create(
                    **ASK,
                    betas=["context-management-2025-06-27"],
                    context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
                    system=[{"type": "text", "text": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
                    thinking={"type": "adaptive"},
                )

        assert asyncio.run(run()).content[-1].text == "Hi"

    def test_without_choice_tools_are_not_shown(self, folder):
        served, _ = create(folder, **WITH_TOOL, tool_choice={"type": "none"})
        assert "get_weather" not in served.prompt()


class TestCounting:
    def test_it_is_the_length_of_the_prompt(self, folder):
        async def run():
            served = Served(folder)
            async with served.anthropic() as client:
                config = {"format": {"type": "json_schema", "schema": PARAMETERS}}
                asked = {"model": MODEL, "messages": ASK["messages"], "system": "Be brief.", "output_config": config}
                counted = await client.messages.count_tokens(**asked)
                await client.messages.create(**asked, max_tokens=5)
                return counted.input_tokens, served.engine.submitted

        counted, submitted = asyncio.run(run())
        assert len(submitted) == 1
        assert counted == len(submitted[0].prompt.token_ids) > 10
