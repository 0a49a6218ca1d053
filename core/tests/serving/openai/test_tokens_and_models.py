"""Models, tokens, rendered prompts, and what a generating model refuses."""

import openai
import pytest

from serving.openai.served import HELLO, said, serve
from zif.serving.http.settings import ServeSettings


class TestModels:
    def test_are_listed(self):
        models = serve().ask(lambda client: client.models.list()).data
        assert [model.id for model in models] == ["embedded"]
        assert models[0].max_model_len == 1024

    def test_every_name_is_listed_and_taken(self):
        served = serve(said("x"), settings=ServeSettings(served_model_name="main,other"))
        assert [model.id for model in served.ask(lambda client: client.models.list()).data] == ["main", "other"]
        answer = served.post("/v1/chat/completions", {"messages": HELLO, "model": "other"})
        assert answer.json()["model"] == "other"
        assert served.post("/v1/chat/completions", {"messages": HELLO}).json()["model"] == "main"

    def test_one_is_described(self):
        assert serve().ask(lambda client: client.models.retrieve("embedded")).id == "embedded"

    def test_unknown_is_404(self):
        with pytest.raises(openai.NotFoundError):
            serve().ask(lambda client: client.models.retrieve("other"))


class TestTokens:
    def test_there_and_back(self):
        served = serve()
        answer = served.post("/tokenize", {"prompt": "Hello there", "add_special_tokens": False}).json()
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 1024
        assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Hello there"}

    def test_long_text_there_and_back(self):
        served, text = serve(), "Once upon a time. " * 1500
        tokens = served.post("/tokenize", {"prompt": text}).json()["tokens"]
        assert served.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}

    def test_spellings(self):
        answer = serve().post("/tokenize", {"prompt": "a", "return_token_strs": True}).json()
        assert answer["token_strs"] == ["a"]

    def test_of_a_chat_equal_the_rendered_ones(self):
        served = serve()
        tokens = served.post("/tokenize", {"messages": HELLO}).json()["tokens"]
        assert served.post("/v1/chat/completions/render", {"messages": HELLO}).json()["token_ids"] == tokens

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": HELLO}),
            ("/tokenize", {"prompt": "a", "tools": []}),
            ("/tokenize", {"messages": HELLO, "chat_template": "x"}),
            ("/tokenize", {"messages": HELLO, "add_special_tokens": True}),
            ("/tokenize", {"prompt": "\ud800"}),
            ("/detokenize", {"tokens": [3072]}),
            ("/detokenize", {"tokens": [-1]}),
            ("/detokenize", {"tokens": ["a"]}),
            ("/detokenize", {}),
        ],
    )
    def test_bad_input_is_refused(self, path, body):
        assert serve().post(path, body).status == 400


class TestRender:
    def test_chat_is_what_the_engine_would_get(self):
        served = serve(said("x"))
        body = {"messages": HELLO, "temperature": 0.25, "max_tokens": 5}
        rendered = served.post("/v1/chat/completions/render", body).json()
        served.post("/v1/chat/completions", body)
        assert rendered["token_ids"] == served.prompt.token_ids
        assert rendered["sampling_params"]["temperature"] == 0.25
        assert rendered["sampling_params"]["max_tokens"] == 5
        assert rendered["model"] == "embedded"
        assert rendered["request_id"]

    def test_completions_are_one_entry_a_prompt(self):
        served = serve(said("x"))
        rendered = served.post("/v1/completions/render", {"prompt": ["one", "two"]}).json()
        assert [entry["prompt"] for entry in rendered] == ["one", "two"]
        served.complete("two")
        assert rendered[1]["token_ids"] == served.prompt.token_ids


class TestModerations:
    def test_are_refused_with_the_reason(self):
        with pytest.raises(openai.BadRequestError, match="moderations") as caught:
            serve().ask(lambda client: client.moderations.create(input="x"))
        assert caught.value.code == "unsupported_by_model"
