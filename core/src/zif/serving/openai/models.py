"""GET /v1/models, and the check that a request asks for the model that is served."""

import time
from typing import Literal

import msgspec

from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import AuthScope, Request, Response, json_response
from zif.serving.http.registry import Route, ServerContext


class Model(msgspec.Struct, frozen=True):
    """A name that requests may use. `created` is when this server started, in seconds since 1970."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "zif"


class ModelList(msgspec.Struct, frozen=True):
    """All names."""

    data: list[Model]
    object: Literal["list"] = "list"


def served_model(asked: str | None, context: ServerContext) -> str:
    """Return the name that answers carry. Raises ApiError (404) for a model that is not served."""
    names = context.settings.model_names(context.engine.info.name)
    if asked is None or asked == "":
        return names[0]
    if asked not in names:
        raise ApiError(
            FailureKind.NOT_FOUND,
            f"the model {asked[:100]!r} is not served here; GET /v1/models lists what is",
            param="model",
            code="model_not_found",
        )
    return asked


class ModelsApi:
    """What is served, for clients that ask first."""

    def __init__(self) -> None:
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(
                "/v1/models",
                "GET",
                AuthScope.INFERENCE,
                self.list_models,
                summary="List the models",
                answer_type=ModelList,
            ),
            Route(
                "/v1/models/{model}",
                "GET",
                AuthScope.INFERENCE,
                self.model,
                summary="Describe a model",
                answer_type=Model,
            ),
        ]

    async def list_models(self, request: Request[None], context: ServerContext) -> Response:
        """Answer GET /v1/models."""
        return json_response(ModelList(self._models(context)))

    async def model(self, request: Request[None], context: ServerContext) -> Response:
        """Answer GET /v1/models/{model}."""
        name = served_model(request.path_value, context)
        return json_response(next(model for model in self._models(context) if model.id == name))

    def _models(self, context: ServerContext) -> list[Model]:
        info = context.engine.info
        names = context.settings.model_names(info.name)
        return [Model(name, self._created, info.max_model_len, names[0]) for name in names]
