"""POST /v1/embeddings, /v1/score and /v1/rerank; and /v1/moderations, which is refused by name."""

import asyncio
import base64
from contextlib import aclosing
from typing import Any

import msgspec

from zif.engine.pooling import PoolingParams
from zif.serving.chat.service import ChatService
from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Request, Response, json_response
from zif.serving.http.registry import Handler, Route, ServerContext
from zif.serving.openai.fields import invalid, refuse
from zif.serving.openai.models import served_model
from zif.serving.openai.pooled_prompts import Asker, Float32, encoded, pair_scores
from zif.serving.openai.pooling_requests import (
    EMBEDDING_REFUSED,
    MAX_TEXTS,
    RERANK_REFUSED,
    SCORE_REFUSED,
    USER_NO_EFFECT,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    PoolingUsage,
    RankedDocument,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
    TextDocument,
)
from zif.serving.openai.usage import origin_of


class ModerationRequest(msgspec.Struct, kw_only=True):
    """Any body: it is refused whatever it says."""


class PoolingApi:
    """Vectors and scores by one model."""

    def __init__(self, service: ChatService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            _route("/v1/embeddings", self.embed, EmbeddingRequest, EmbeddingList, "Return the vectors of texts"),
            _route("/v1/score", self.score, ScoreRequest, ScoreList, "Score pairs of texts"),
            _route(
                "/v1/rerank", self.rerank, RerankRequest, Ranking, "Order documents by how well they answer a query"
            ),
            Route(
                "/v1/moderations",
                "POST",
                AuthScope.INFERENCE,
                self.refuse,
                ModerationRequest,
                summary="Refused: no moderations here",
            ),
        ]

    async def embed(self, request: Request[EmbeddingRequest], context: ServerContext) -> Response:
        """Return a vector for each input."""
        body = request.body
        refuse(body, EMBEDDING_REFUSED)
        model = request.record.model = served_model(body.model, context)
        asker = _asker(request, context)
        params = PoolingParams(dimensions=body.dimensions)
        asker.require(params)
        given = await self._tokens(body)
        data: list[Embedding | None] = [None] * len(given)
        async with aclosing(asker.vectors(given, params)) as vectors:
            async for vector in vectors:
                # Written one by one: thousands of vectors at the end would hold up everybody else.
                written = _written(vector.values, body.encoding_format or "float")
                data[vector.index] = Embedding(vector.index, written)
                await asyncio.sleep(0)
        return json_response(EmbeddingList([each for each in data if each is not None], model, _usage(asker)))

    async def score(self, request: Request[ScoreRequest], context: ServerContext) -> Response:
        """Return a score for each pair of texts; one text on the first side stands beside all of the second."""
        body = request.body
        refuse(body, SCORE_REFUSED)
        model = request.record.model = served_model(body.model, context)
        asker = _asker(request, context)
        queries = _texts(body.text_1, body.queries, ("text_1", "queries"))
        documents = _texts(body.text_2, body.documents, ("text_2", "documents"))
        if len(queries) not in (1, len(documents)):
            raise invalid(
                f"'text_1' has {len(queries)} texts and 'text_2' {len(documents)}; give one, or one for each", "text_1"
            )
        queries = queries * len(documents) if len(queries) == 1 else queries
        scores = await pair_scores(asker, await self._service.prompts(), queries, documents)
        origin = origin_of("score", request.id, model, context.engine.info)
        data = [Score(index, score) for index, score in enumerate(scores)]
        return json_response(ScoreList(origin.id, origin.created, model, data, _usage(asker)))

    async def rerank(self, request: Request[RerankRequest], context: ServerContext) -> Response:
        """Return documents in the order of their scores; among equals the earlier comes first."""
        body = request.body
        refuse(body, RERANK_REFUSED)
        model = request.record.model = served_model(body.model, context)
        asker = _asker(request, context)
        texts = [each.text if isinstance(each, TextDocument) else each for each in body.documents]
        scores = await pair_scores(asker, await self._service.prompts(), [body.query] * len(texts), texts)
        order = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n]
        shown = body.return_documents is not False
        results = [RankedDocument(k, scores[k], TextDocument(texts[k]) if shown else None) for k in order]
        return json_response(Ranking(f"rerank-{request.id}", model, results, _usage(asker)))

    async def refuse(self, request: Request[ModerationRequest], context: ServerContext) -> Response:
        """Answer 400 with the reason: another try would not help, and clients repeat what is answered 501."""
        raise ApiError(
            FailureKind.INVALID,
            f"{context.engine.info.name[:100]!r} has no head that makes moderations; ask a server of a model that has",
            code="unsupported_by_model",
        )

    async def _tokens(self, body: EmbeddingRequest) -> list[list[int]]:
        """Return the inputs as tokens. Raises ApiError or RequestError for what is none."""
        given = body.input
        is_one = isinstance(given, str) or all(type(entry) is int for entry in given)
        entries: list[Any] = [given] if is_one else list(given)
        kinds = {type(entry) for entry in entries}
        if len(kinds) > 1 or int in kinds:
            raise invalid("'input' mixes texts and tokens; give texts, token ids, or lists of token ids", "input")
        if len(entries) > MAX_TEXTS:
            raise invalid(f"'input' has {len(entries)} entries; at most {MAX_TEXTS} are taken at once", "input")
        if list in kinds and body.add_special_tokens is not None:
            raise invalid("'add_special_tokens' has no meaning for token ids; leave it out", "add_special_tokens")
        if list in kinds:
            return entries
        prompts, special = await self._service.prompts(), body.add_special_tokens is not False
        return await encoded(entries, prompts, add_special_tokens=special)


def _route(
    path: str, handler: Handler, request_type: type[msgspec.Struct], answer_type: type[msgspec.Struct], summary: str
) -> Route:
    return Route(
        path,
        "POST",
        AuthScope.INFERENCE,
        handler,
        request_type,
        no_effect=USER_NO_EFFECT,
        asks_engine=True,
        summary=summary,
        answer_type=answer_type,
    )


def _asker(
    request: Request[EmbeddingRequest] | Request[ScoreRequest] | Request[RerankRequest], context: ServerContext
) -> Asker:
    body = request.body
    return Asker(context.engine, request.caller, request.record, body.cache_salt or "", body.priority or 0)


def _texts(first: str | list[str] | None, second: str | list[str] | None, names: tuple[str, str]) -> list[str]:
    """Return the texts of one side, which has two names. Raises ApiError for none, and for both."""
    if first is not None and second is not None:
        raise invalid(f"{names[0]!r} and {names[1]!r} are the same; give one", names[1])
    given = second if first is None else first
    if given is None:
        raise invalid(f"{names[0]!r} is missing; give a text, or a list of texts", names[0])
    return [given] if isinstance(given, str) else given


def _written(vector: Float32, encoding_format: str) -> msgspec.Raw | str:
    """Return a vector as its JSON, or as the base64 of its bytes: float32, little endian."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def _usage(asker: Asker) -> PoolingUsage:
    return PoolingUsage(asker.record.num_prompt_tokens, asker.record.num_prompt_tokens)
