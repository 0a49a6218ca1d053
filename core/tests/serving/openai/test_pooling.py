"""Embeddings, scores and rankings over an engine that is a script: what is asked of it, and what is answered."""

import base64
import math
import struct
import typing

import openai
import pytest
from openai.types import embedding_create_params

from serving.fakes import Script
from serving.openai.served import serve
from zif.engine.pooling import PoolingAbilities, PoolingParams, PoolingTask
from zif.serving.answers import OverloadedError
from zif.serving.openai.pooling_requests import MAX_TEXTS, USER_NO_EFFECT, EmbeddingRequest

HEAD = PoolingAbilities(generates=False, labels=("relevant",))
EMBEDS = PoolingAbilities(num_dimensions=2)
WORKS = {
    "input": "x",
    "model": "embedded",
    "dimensions": 2,
    "encoding_format": "float",
}
"""Fields that do something, with a value that is taken."""


def serve_embeddings(script=None, **info):
    return serve(script, **({"pooling": EMBEDS} | info))


def by_length(prompt, sampling):
    """Make vectors that tell prompts apart."""
    return Script(vector=[float(len(prompt.token_ids)), 1.0])


class TestEmbeddings:
    def test_client_reads_floats_and_base64(self):
        served = serve_embeddings(by_length)
        texts = ["one two three four", "five"]
        for options in ({}, {"encoding_format": "float"}):
            answer = served.ask(lambda c, o=options: c.embeddings.create(model="embedded", input=texts, **o))
            lengths = [len(each.prompt.token_ids) for each in served.engine.submitted[-2:]]
            assert [entry.embedding for entry in answer.data] == [[float(n), 1.0] for n in lengths]
            assert [entry.index for entry in answer.data] == [0, 1]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)
        raw = served.post("/v1/embeddings", {"input": [[1, 2, 3]], "encoding_format": "base64"}).json()
        assert struct.unpack("<2f", base64.b64decode(raw["data"][0]["embedding"])) == (3.0, 1.0)
        assert raw["object"] == "list"

    @pytest.mark.parametrize(
        ("given", "prompts"),
        [([5, 6, 7], [[5, 6, 7]]), ([[5], [6, 7]], [[5], [6, 7]]), (["", "x"], None), ("x", None)],
    )
    def test_inputs_become_prompts(self, given, prompts):
        served = serve_embeddings()
        answer = served.post("/v1/embeddings", {"input": given, "dimensions": 1, "cache_salt": "s", "priority": 3})
        asked = served.engine.submitted
        assert len(answer.json()["data"]) == len(asked)
        assert all(each.prompt.pooling == PoolingParams(dimensions=1) for each in asked)
        assert all(each.prompt.cache_salt and each.priority == 3 for each in asked)
        if prompts is not None:
            assert [each.prompt.token_ids for each in asked] == prompts

    @pytest.mark.parametrize(
        ("param", "fields"),
        [
            ("input", {"input": ["x", [5]]}),
            ("input", {"input": ["x", 5]}),
            ("input", {"input": []}),
            ("input", {"input": {"text": "x"}}),
            ("input", {"input": ["x"] * (MAX_TEXTS + 1)}),
            ("dimensions", {"dimensions": 0}),
            ("dimensions", {"dimensions": 3}),
            ("encoding_format", {"encoding_format": "int8"}),
            ("truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
            ("messages", {"messages": [{"role": "user", "content": "x"}]}),
            ("add_special_tokens", {"input": [[5]], "add_special_tokens": False}),
            ("cache_salt", {"cache_salt": ""}),
        ],
    )
    def test_what_is_wrong_is_refused_and_named(self, param, fields):
        served = serve_embeddings()
        answer = served.post("/v1/embeddings", {"input": "x", **fields})
        assert answer.status == 400, answer.body
        assert (answer.json()["error"]["param"] or "").startswith(param)
        assert served.engine.submitted == []

    def test_a_text_too_long_is_refused_before_the_engine_is_asked(self):
        served = serve_embeddings(max_model_len=16)
        assert served.post("/v1/embeddings", {"input": [[5] * 16]}).status == 200
        answer = served.post("/v1/embeddings", {"input": [[5], [5] * 17]})
        assert answer.status == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert len(served.engine.submitted) == 1

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            (Script(finish_reason="error"), 500),
            (Script(finish_reason="abort"), 408),
            (Script(error=OverloadedError("full", 2.0)), 429),
        ],
    )
    def test_what_fails_in_the_engine_is_told(self, script, status):
        assert serve_embeddings(script).post("/v1/embeddings", {"input": ["x", "y"]}).status == status

    def test_models_that_cannot_say_why(self):
        for abilities, reason in ((PoolingAbilities(problem="no rows here"), "no rows here"), (HEAD, "score head")):
            with pytest.raises(openai.BadRequestError, match=reason) as caught:
                serve(pooling=abilities).ask(lambda c: c.embeddings.create(model="embedded", input="x"))
            assert caught.value.code == "unsupported_by_model"

    @pytest.mark.parametrize(("abilities", "param"), [(EMBEDS, "dimensions"), (HEAD, None)])
    def test_a_refusal_names_dimensions_only_where_they_are_the_reason(self, abilities, param):
        answer = serve_embeddings(pooling=abilities).post("/v1/embeddings", {"input": "x", "dimensions": 3})
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)


class TestEveryField:
    FIELDS: typing.ClassVar = set(typing.get_type_hints(embedding_create_params.EmbeddingCreateParams))

    def test_is_classified_and_declared(self):
        assert set(WORKS) | set(USER_NO_EFFECT) == self.FIELDS
        assert set(EmbeddingRequest.__struct_fields__) >= self.FIELDS

    def test_is_taken_and_null_is_as_if_left_out(self):
        for name in self.FIELDS - {"input"}:
            for value in ({**WORKS, "user": "u"}[name], None):
                assert serve_embeddings().post("/v1/embeddings", {"input": "x", name: value}).status == 200
        assert '"user"' in serve_embeddings().get("/props").body.decode()


class TestScores:
    def test_are_cosines_of_embeddings(self):
        served = serve_embeddings(by_length)
        answer = served.post(
            "/v1/score", {"text_1": "one two three", "text_2": ["one two three", "four", "four"]}
        ).json()
        first, second = (len(each.prompt.token_ids) for each in served.engine.submitted)
        cosine = (first * second + 1) / math.sqrt((first**2 + 1) * (second**2 + 1))
        assert [entry["score"] for entry in answer["data"]] == pytest.approx([1.0, cosine, cosine])
        assert answer["usage"]["prompt_tokens"] == first + second

    def test_of_a_head_are_of_the_tokens_of_the_pair(self):
        served = serve(lambda prompt, sampling: Script(vector=[len(prompt.token_ids) / 10]), pooling=HEAD)
        body = {"queries": ["one", "two"], "documents": ["three", "four five six"]}
        answer = served.post("/v1/score", body).json()
        asked = served.engine.submitted
        assert all(each.prompt.pooling.task is PoolingTask.CLASSIFY for each in asked)
        expected = [1 / (1 + math.exp(-len(each.prompt.token_ids) / 10)) for each in asked]
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected)
        alone = served.post("/tokenize", {"prompt": "four five six"}).json()["count"]
        assert len(asked[1].prompt.token_ids) > alone

    @pytest.mark.parametrize(
        "fields",
        [
            {"text_1": "x"},
            {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]},
            {"text_1": "x", "text_2": "y", "documents": "z"},
            {"text_1": "x", "text_2": []},
            {"text_1": "x", "text_2": "y", "data_1": "x"},
        ],
    )
    def test_of_texts_that_are_no_pairs_are_refused(self, fields):
        served = serve_embeddings()
        assert served.post("/v1/score", fields).status == 400
        assert served.engine.submitted == []

    def test_of_many_labels_are_refused(self):
        served = serve(pooling=PoolingAbilities(labels=("a", "b", "c")))
        answer = served.post("/v1/score", {"text_1": "x", "text_2": "y"})
        assert answer.status == 400
        assert "3 labels" in answer.json()["error"]["message"]


class TestRankings:
    DOCUMENTS: typing.ClassVar = ["four", "one two three five six", {"text": "one two three five"}]

    def rank(self, **fields):
        served = serve(lambda prompt, sampling: Script(vector=[float(len(prompt.token_ids))]), pooling=HEAD)
        return served.post("/v1/rerank", {"query": "q", "documents": self.DOCUMENTS, **fields})

    def test_go_from_the_best_to_the_worst(self):
        results = self.rank().json()["results"]
        assert [entry["index"] for entry in results] == [1, 2, 0]
        assert [entry["document"]["text"] for entry in results] == [
            "one two three five six",
            "one two three five",
            "four",
        ]
        assert results == sorted(results, key=lambda entry: -entry["relevance_score"])

    def test_hold_what_is_asked_for(self):
        results = self.rank(top_n=2, return_documents=False).json()["results"]
        assert [set(entry) for entry in results] == [{"index", "relevance_score"}] * 2
        assert len(self.rank(top_n=99).json()["results"]) == 3

    @pytest.mark.parametrize(
        ("param", "fields"),
        [
            ("documents", {"documents": []}),
            ("documents", {"documents": [{"title": "x"}]}),
            ("documents", {"documents": ["x"] * (MAX_TEXTS + 1)}),
            ("top_n", {"top_n": 0}),
            ("rank_fields", {"rank_fields": ["title"]}),
            ("max_tokens_per_doc", {"max_tokens_per_doc": 10}),
            ("query", {"query": None}),
        ],
    )
    def test_of_what_is_wrong_are_refused(self, param, fields):
        answer = self.rank(**fields)
        assert answer.status == 400, answer.body
        assert (answer.json()["error"]["param"] or "").startswith(param)
