"""POST /v1/chat/completions as the official client sees it."""

import pytest

from serving.fakes import CHECKPOINT
from serving.openai.served import HELLO, said, serve, write_model
from zif.text.tokenizer import load_tokenizer


@pytest.fixture
def tools_folder(tmp_path):
    return write_model(tmp_path)


class TestWhole:
    def test_answer_has_text_reason_and_usage(self):
        answer = serve(said("Hi", " there", num_cached_tokens=3)).chat()
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hi there", "stop")
        assert choice.message.refusal is None
        assert choice.message.tool_calls is None
        assert answer.object == "chat.completion"
        assert answer.id.startswith("chatcmpl-")
        assert answer.model == "embedded"
        assert answer.system_fingerprint
        assert answer.usage.completion_tokens == 2
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2
        assert answer.usage.prompt_tokens_details.cached_tokens == 3
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0

    def test_prompt_is_the_rendered_template(self):
        served = serve(said("x"))
        served.chat([{"role": "system", "content": "Be brief"}, *HELLO])
        text = "<|endoftext|><|user|>Be brief<|user|>Hello<|assistant|>"
        assert served.prompt.token_ids == load_tokenizer(CHECKPOINT).encode(text, add_special_tokens=False)

    def test_samples_are_choices(self):
        answer = serve(said("a", "b")).chat(n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert {choice.message.content for choice in answer.choices} == {"ab"}
        assert answer.usage.completion_tokens == 6

    def test_length_is_a_finish_reason(self):
        assert serve(said("a", "b", "c")).chat(max_tokens=2).choices[0].finish_reason == "length"

    def test_ids_differ(self):
        served = serve(said("a"))
        assert served.chat().id != served.chat().id

    def test_stop_string_is_named(self):
        answer = serve(said("a", stop_reason="END")).chat(stop=["END"])
        assert answer.choices[0].stop_reason == "END"

    def test_developer_is_system_for_a_template_that_knows_none(self, tools_folder):
        served = serve(said("x"), tools_folder)
        text = served.post(
            "/v1/chat/completions/render", {"messages": [{"role": "developer", "content": "Be brief"}]}
        ).json()["prompt"]
        assert "system: Be brief" in text

    def test_last_message_is_continued(self):
        served = serve(said("x"))
        body = {"messages": [*HELLO, {"role": "assistant", "content": "Once upon"}], "continue_final_message": True}
        text = served.post("/v1/chat/completions/render", body).json()["prompt"]
        assert text.endswith("Once upon")


class TestSampling:
    def test_every_option_arrives(self):
        served = serve(said("x"))
        served.chat(
            temperature=0.3, top_p=0.7, presence_penalty=0.5, frequency_penalty=-0.5, seed=7, stop=["A", "B"],
            logit_bias={"5": 3}, max_completion_tokens=9, logprobs=True, top_logprobs=2, n=2,
            extra_body={
                "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [3],
                "allowed_token_ids": [3, 4, 5], "bad_words": ["no"], "ignore_eos": True,
                "include_stop_str_in_output": True, "skip_special_tokens": False, "prompt_logprobs": 1, "priority": 4,
            },
        )  # fmt: skip
        sampling = served.sampling
        assert (sampling.temperature, sampling.top_p, sampling.n, sampling.seed) == (0.3, 0.7, 2, 7)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert (sampling.stop_strings, dict(sampling.logit_bias), sampling.max_tokens) == (("A", "B"), {5: 3.0}, 9)
        assert (sampling.logprobs, sampling.prompt_logprobs) == (2, 1)
        assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (4, 0.1, 1.2, 2)
        assert (list(sampling.stop_token_ids), list(sampling.allowed_token_ids)) == ([3], [3, 4, 5])
        assert (list(sampling.bad_words), sampling.ignore_eos) == (["no"], True)
        assert (sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (True, False)
        assert served.engine.submitted[-1].priority == 4

    def test_model_defaults_hold_where_nothing_is_said(self):
        from dataclasses import replace

        from serving.fakes import MODEL_INFO

        defaults = replace(MODEL_INFO.default_sampling, temperature=0.6, top_k=20, max_tokens=5)
        served = serve(said("x"), default_sampling=defaults)
        served.chat(top_p=0.5)
        assert (served.sampling.temperature, served.sampling.top_k, served.sampling.top_p) == (0.6, 20, 0.5)
        assert served.sampling.max_tokens is None

    def test_salt_of_the_caller_and_of_the_request_differ(self):
        served = serve(said("x"))
        served.chat()
        served.chat(extra_body={"cache_salt": "mine"})
        plain, salted = (submission.prompt.cache_salt for submission in served.engine.submitted)
        assert plain != salted

    def test_prompt_is_cut_from_the_front(self):
        served = serve(said("x"))
        served.chat([{"role": "user", "content": "one two three four five six"}])
        whole = served.prompt.token_ids
        served.chat(
            [{"role": "user", "content": "one two three four five six"}], extra_body={"truncate_prompt_tokens": 4}
        )
        assert served.prompt.token_ids == whole[-4:]


class TestLogprobs:
    def test_chosen_and_top_tokens(self):
        answer = serve(said("Hi", "!")).chat(logprobs=True, top_logprobs=2)
        first = answer.choices[0].logprobs.content[0]
        assert (first.token, first.logprob, first.bytes) == ("Hi", -0.5, list(b"Hi"))
        assert [top.logprob for top in first.top_logprobs] == sorted(
            (t.logprob for t in first.top_logprobs), reverse=True
        )
        assert len(first.top_logprobs) == 2
        assert len(answer.choices[0].logprobs.content) == 2

    def test_none_without_asking(self):
        assert serve(said("Hi")).chat().choices[0].logprobs is None

    def test_prompt_logprobs_begin_with_none(self):
        served = serve(said("Hi"))
        answer = served.chat(extra_body={"prompt_logprobs": 1})
        assert answer.prompt_logprobs[0] is None
        assert len(answer.prompt_logprobs) == len(served.prompt.token_ids)
        token_id = str(served.prompt.token_ids[1])
        assert answer.prompt_logprobs[1][token_id]["rank"] == 1

    def test_tokens_as_ids(self):
        answer = serve(said("Hi", token_ids=[77])).chat(
            logprobs=True, extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True}
        )
        assert answer.choices[0].logprobs.content[0].token == "token_id:77"
        assert answer.choices[0].token_ids == [77]
        assert answer.prompt_token_ids


class TestStream:
    def test_chunks_have_role_text_and_end(self):
        chunks = serve(said("Hi", " there")).chat_chunks()
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi there"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert all(chunk.usage is None for chunk in chunks)

    def test_usage_comes_last_when_asked_for(self):
        chunks = serve(said("Hi", " there")).chat_chunks(stream_options={"include_usage": True})
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 2
        assert all(chunk.usage is None for chunk in chunks[:-1])

    def test_continuous_usage_grows(self):
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = serve(said("a", "b", "c")).chat_chunks(stream_options=options)
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 3

    def test_ends_with_done(self):
        answer = serve(said("Hi")).post("/v1/chat/completions", {"messages": HELLO, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body.endswith(b"data: [DONE]\n\n")

    def test_samples_are_told_apart(self):
        chunks = serve(said("a", "b")).chat_chunks(n=2)
        for index in range(2):
            own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
            assert "".join(choice.delta.content or "" for choice in own) == "ab"
            assert own[-1].finish_reason == "stop"

    def test_logprobs_of_every_token(self):
        chunks = serve(said("a", "b")).chat_chunks(logprobs=True)
        tokens = [entry.token for chunk in chunks if (found := chunk.choices[0].logprobs) for entry in found.content]
        assert tokens == ["a", "b"]

    def test_token_ids(self):
        chunks = serve(said("a", "b", token_ids=[5, 6])).chat_chunks(extra_body={"return_token_ids": True})
        assert chunks[0].prompt_token_ids
        assert [i for chunk in chunks for i in getattr(chunk.choices[0], "token_ids", None) or []] == [5, 6]
