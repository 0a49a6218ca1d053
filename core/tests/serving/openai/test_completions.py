"""POST /v1/completions as the official client and lm-evaluation-harness see it."""

import asyncio

import openai
import pytest

from serving.fakes import Script
from serving.openai.served import said, serve
from zif.serving.answers import OverloadedError
from zif.serving.openai.samples import merged


class TestPrompts:
    def test_text(self):
        served = serve(said("a", "b"))
        answer = served.complete("Hello")
        assert answer.object == "text_completion"
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
        assert answer.usage.prompt_tokens == len(served.prompt.token_ids)
        assert served.prompt.token_ids == served.post("/tokenize", {"prompt": "Hello"}).json()["tokens"]

    def test_texts_are_choices_in_order(self):
        served = serve(lambda prompt, sampling: said(f"<{prompt.token_ids[0]}>"))
        answer = served.complete([[1], [2], [3]], n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == ["<1>", "<1>", "<2>", "<2>", "<3>", "<3>"]
        assert answer.usage.prompt_tokens == 3
        assert answer.usage.completion_tokens == 6

    def test_token_ids_are_one_prompt(self):
        served = serve(said("a"))
        served.complete([5, 6, 7])
        assert served.prompt.token_ids == [5, 6, 7]

    def test_lists_of_texts(self):
        served = serve(said("a"))
        assert len(served.complete(["one", "two"]).choices) == 2

    def test_default_length_is_the_documented_one(self):
        served = serve()
        served.complete()
        assert served.sampling.max_tokens == 16

    def test_prompt_is_cut_from_the_front(self):
        served = serve(said("a"))
        served.complete([1, 2, 3, 4], extra_body={"truncate_prompt_tokens": 2})
        assert served.prompt.token_ids == [3, 4]

    @pytest.mark.parametrize("prompt", [[1, "a"], [[1], 2], ["a", [1]], [], [-1], [[1, "a"]], 5, {"a": 1}])
    def test_what_is_no_prompt_is_refused(self, prompt):
        answer = serve(said("a")).post("/v1/completions", {"prompt": prompt})
        assert answer.status == 400
        assert "prompt" in answer.json()["error"]["param"]

    def test_many_prompts_are_not_all_in_the_engine_at_once(self):
        served = serve(said("a"))
        answer = served.complete([[k + 1] for k in range(200)])
        assert len(answer.choices) == 200
        assert len(served.engine.submitted) == 200

    def test_too_many_answers_are_refused(self):
        served = serve(said("a"))
        with pytest.raises(openai.BadRequestError) as caught:
            served.complete([[1]] * 1000, n=100)
        assert caught.value.param == "prompt"
        assert served.engine.submitted == []


class TestEchoAndLogprobs:
    def test_echo_repeats_the_prompt(self):
        assert serve(said(" world")).complete("Hello", echo=True).choices[0].text == "Hello world"

    def test_echo_of_tokens_is_their_text(self):
        served = serve(said("!"))
        ids = served.post("/tokenize", {"prompt": "Hello there"}).json()["tokens"]
        assert served.complete(ids, echo=True).choices[0].text == "Hello there!"

    @pytest.mark.parametrize("max_tokens", [0, 1])
    def test_loglikelihood_as_evaluations_ask_for_it(self, max_tokens):
        served = serve(said("!"))
        ids = [10, 11, 12, 13]
        choice = served.complete(ids, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1).choices[0]
        logprobs = choice.logprobs
        assert served.sampling.max_tokens == 1
        assert served.sampling.prompt_logprobs == 1
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4 + max_tokens
        assert len(logprobs.text_offset) == 4 + max_tokens
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        context = 2
        scored = logprobs.token_logprobs[context:4]
        assert sum(scored) == pytest.approx(-1.0)
        for token, top in zip(logprobs.tokens[context:4], logprobs.top_logprobs[context:4], strict=True):
            assert top[token] == max(top.values())
        assert choice.finish_reason == ("length" if not max_tokens else "stop")

    def test_nothing_is_generated_for_zero_tokens(self):
        answer = serve(said("!")).complete("Hello", max_tokens=0)
        assert answer.choices[0].text == ""
        assert answer.usage.completion_tokens == 0

    def test_logprobs_of_the_answer(self):
        logprobs = serve(said("ab", "c")).complete(logprobs=2).choices[0].logprobs
        assert logprobs.tokens == ["ab", "c"]
        assert logprobs.text_offset == [0, 2]
        assert logprobs.token_logprobs == [-0.5, -0.5]
        assert logprobs.top_logprobs[0]["ab"] == -0.5
        assert len(logprobs.top_logprobs[0]) == 2

    def test_prompt_logprobs_by_token_id(self):
        answer = serve(said("a")).complete([7, 8], extra_body={"prompt_logprobs": 0})
        positions = answer.choices[0].prompt_logprobs
        assert positions[0] is None
        assert positions[1]["8"]["logprob"] == -0.5

    def test_part_of_a_character_is_written_as_bytes(self):
        served = serve(said("\ufffd", token_ids=[0]))
        names = served.ask(lambda client: served.service.prompts()).tokenizer.vocab()
        spelling, token_id = next((s, i) for s, i in names.items() if len(s) == 1 and ord(s) > 0x100)
        assert spelling
        served.engine.script = said("\ufffd", token_ids=[token_id])
        assert served.complete(logprobs=1).choices[0].logprobs.tokens[0].startswith("bytes:\\x")


class TestStream:
    def test_pieces_join_to_the_whole(self):
        served = serve(said("a", "b", "c"))
        chunks = served.completion_chunks("Hello", echo=True, logprobs=1)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Helloabc"
        tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
        assert len(tokens) == len(served.prompt.token_ids) + 3
        offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
        assert offsets == sorted(offsets)
        assert chunks[-1].choices[0].finish_reason == "stop"

    def test_several_prompts_keep_their_order_each(self):
        served = serve(lambda prompt, sampling: said(*(f"{prompt.token_ids[0]}{letter}" for letter in "abc")))
        chunks = served.completion_chunks([[1], [2]], n=2, stream_options={"include_usage": True})
        texts = dict.fromkeys(range(4), "")
        for chunk in chunks[:-1]:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {0: "1a1b1c", 1: "1a1b1c", 2: "2a2b2c", 3: "2a2b2c"}
        assert chunks[-1].usage.completion_tokens == 12
        assert chunks[-1].choices == []

    def test_zero_tokens(self):
        chunks = serve(said("!")).completion_chunks("Hello", max_tokens=0)
        assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [("", "length")]


class TestFaults:
    def test_one_prompt_refused_ends_all(self):
        def script(prompt, sampling):
            return Script(error=OverloadedError("full", 1.0)) if prompt.token_ids == [2] else said("a", "b")

        served = serve(script)
        with pytest.raises(openai.RateLimitError):
            served.complete([[1], [2], [3]])
        assert all(submission.ended.is_set() for submission in served.engine.submitted)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("suffix", "end"), ("best_of", 3), ("use_beam_search", True), ("guided_json", {}), ("request_id", "mine")],
    )
    def test_what_does_not_work_is_refused_by_name(self, field, value):
        answer = serve(said("a")).post("/v1/completions", {"prompt": "x", field: value})
        assert answer.status == 400
        assert answer.json()["error"]["param"] == field
        assert field in answer.json()["error"]["message"]

    @pytest.mark.parametrize(("field", "value"), [("suffix", ""), ("best_of", 1), ("use_beam_search", False)])
    def test_values_that_change_nothing_pass(self, field, value):
        assert serve(said("a")).post("/v1/completions", {"prompt": "x", field: value}).status == 200


class TestMerging:
    def test_values_keep_each_sources_order_and_all_are_closed(self):
        closed = []

        async def source(name, count):
            try:
                for k in range(count):
                    yield f"{name}{k}"
                    await asyncio.sleep(0)
            finally:
                closed.append(name)

        async def read():
            sources = [source(name, count) for name, count in [("a", 3), ("b", 0), ("c", 5)]]
            return [(item.source, item.value) async for item in merged(sources, at_once=2)]

        items = asyncio.run(read())
        assert [value for index, value in items if index == 0] == ["a0", "a1", "a2", None]
        assert [value for index, value in items if index == 1] == [None]
        assert [value for index, value in items if index == 2] == ["c0", "c1", "c2", "c3", "c4", None]
        assert sorted(closed) == ["a", "b", "c"]

    def test_at_most_so_many_at_once(self):
        open_now, most = set(), []

        async def source(name):
            open_now.add(name)
            most.append(len(open_now))
            try:
                await asyncio.sleep(0)
                yield name
            finally:
                open_now.discard(name)

        async def read():
            return [item async for item in merged([source(k) for k in range(20)], at_once=3)]

        assert len(asyncio.run(read())) == 40
        assert max(most) == 3

    def test_closing_early_closes_sources_that_wait(self):
        closed = []

        async def source(name):
            try:
                yield name
                await asyncio.Event().wait()
            finally:
                closed.append(name)

        async def read():
            items = merged([source("a"), source("b")], at_once=2)
            await anext(items)
            await items.aclose()

        asyncio.run(read())
        assert sorted(closed) == ["a", "b"]
