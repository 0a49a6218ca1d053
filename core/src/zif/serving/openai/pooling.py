"""Embeddings and scores: refused by name, because a model that generates has no head to pool with.

Declared, so that callers read why, where an unknown path would tell them nothing.
"""

from typing import Any

import msgspec

from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Request, Response
from zif.serving.http.registry import Route, ServerContext

PATHS = {
    "/v1/embeddings": "embeddings",
    "/v1/score": "scores",
    "/v1/rerank": "rankings",
    "/v1/moderations": "moderations",
}


class PoolingRequest(msgspec.Struct, kw_only=True):
    """Any body: it is refused whatever it says."""

    model: Any = None
    input: Any = None
    encoding_format: Any = None
    dimensions: Any = None
    user: Any = None
    text_1: Any = None
    text_2: Any = None
    query: Any = None
    documents: Any = None
    top_n: Any = None


class PoolingApi:
    """What a generating model cannot do."""

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(path, "POST", AuthScope.INFERENCE, self.refuse, PoolingRequest, summary=f"Refused: no {what} here")
            for path, what in PATHS.items()
        ]

    async def refuse(self, request: Request[PoolingRequest], context: ServerContext) -> Response:
        """Answer 400 with the reason: another try would not help, and clients repeat what is answered 501."""
        what = PATHS[request.path]
        raise ApiError(
            FailureKind.INVALID,
            f"{context.engine.info.name[:100]!r} generates text and has no head that makes {what}; ask a server"
            " of a model that does",
            code="unsupported_by_model",
        )
