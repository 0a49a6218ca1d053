"""Requests for vectors and scores, and their answers.

Embeddings are OpenAI's, scores have the form of vLLM's, rankings that of Jina's and Cohere's.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from zif.serving.openai.completion_request import PromptIds
from zif.serving.openai.fields import Identity, Name, PositiveCount, Refusal, TokenId

MAX_TEXTS = 2048
"""Inputs of one request, as OpenAI has it."""

MAX_INPUT_TOKENS = 2**20
"""Token ids in one list: a list of ids and one of texts have the same type."""

Text = Annotated[str, Meta(max_length=2**23)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256)]
Texts = Annotated[list[Text], Meta(min_length=1, max_length=MAX_TEXTS)]

NOT_CUT = Refusal("no text is cut; send shorter ones")

EMBEDDING_REFUSED: Mapping[str, Refusal] = {
    "truncate_prompt_tokens": NOT_CUT,
    "messages": Refusal("texts are embedded as they are; render the chat and send it as input"),
}
SCORE_REFUSED: Mapping[str, Refusal] = {
    "truncate_prompt_tokens": NOT_CUT,
    "data_1": Refusal("pairs of texts are text_1 and text_2"),
    "data_2": Refusal("pairs of texts are text_1 and text_2"),
}
RERANK_REFUSED: Mapping[str, Refusal] = {
    "truncate_prompt_tokens": NOT_CUT,
    "truncation": NOT_CUT,
    "max_tokens_per_doc": NOT_CUT,
    "max_chunks_per_doc": NOT_CUT,
    "rank_fields": Refusal("a document is a text, or an object with its 'text'"),
}

USER_NO_EFFECT: Mapping[str, str] = {"user": "callers are told apart by their keys"}


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/embeddings. `input`: a text, texts, token ids, or lists of token ids."""

    input: Text | Annotated[list[Text | TokenId | PromptIds], Meta(min_length=1, max_length=MAX_INPUT_TOKENS)]
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveCount | None = None
    user: Identity | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None

    truncate_prompt_tokens: Any = None
    messages: Any = None


class ScoreRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/score: `text_1` and `text_2`, or by their other names `queries` and `documents`."""

    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None
    model: Name | None = None
    user: Identity | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None

    truncate_prompt_tokens: Any = None
    data_1: Any = None
    data_2: Any = None


class TextDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as an object."""

    text: Text


class RerankRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/rerank. The best `top_n` documents are returned, by default all, with their texts."""

    query: Text
    documents: Annotated[list[Text | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)]
    model: Name | None = None
    top_n: PositiveCount | None = None
    return_documents: bool | None = None
    user: Identity | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None

    truncate_prompt_tokens: Any = None
    truncation: Any = None
    max_tokens_per_doc: Any = None
    max_chunks_per_doc: Any = None
    rank_fields: Any = None


class PoolingUsage(msgspec.Struct, frozen=True):
    """Token counts. Nothing is generated, so both are the same."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    """One vector: numbers, or their bytes in base64. Encoded ahead, one by one."""

    index: int
    embedding: msgspec.Raw | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """The vectors of all inputs."""

    data: list[Embedding]
    model: str
    usage: PoolingUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct, frozen=True):
    """The score of one pair."""

    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(msgspec.Struct, frozen=True):
    """The scores of all pairs."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class RankedDocument(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document of the request, by its index there."""

    index: int
    relevance_score: float
    document: TextDocument | None = None


class Ranking(msgspec.Struct, frozen=True):
    """The documents from the best to the worst."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: PoolingUsage
