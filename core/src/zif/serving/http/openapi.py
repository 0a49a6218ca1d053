"""The OpenAPI document of a server, generated from its routes and their request types.

Source: OpenAPI Specification 3.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from zif import __version__
from zif.serving.http.exchange import EVENT_STREAM, JSON, AuthScope, Request, Response, json_response
from zif.serving.http.registry import Registry, Route, ServerContext

_REFERENCES = "#/components/schemas/{name}"
_ANSWER = "answer."
"""Goes before the names of what answers are made of: requests have parts of the same names."""


def openapi_route() -> Route:
    """Return the route that serves the document."""
    return Route("/openapi.json", "GET", AuthScope.PUBLIC, openapi, hidden=True)


async def openapi(request: Request[None], context: ServerContext) -> Response:
    """Answer with the document."""
    return json_response(openapi_document(context.registry))


def openapi_document(registry: Registry) -> dict[str, Any]:
    """Return the document of all routes that are not hidden."""
    routes = [route for route in registry.routes() if not route.hidden]
    types = [route.request_type for route in routes if route.request_type is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCES)
    schema_of = dict(zip(types, schemas, strict=True))
    answers, answer_components = _answer_schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        schema = None if route.request_type is None else schema_of[route.request_type]
        operation = _operation(route, schema)
        operation["responses"] = _responses(route, answers)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "zif", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components | answer_components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _answer_schemas(routes: Sequence[Route]) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type that answers have, and the parts that these refer to."""
    types = [route.answer_type for route in routes if route.answer_type is not None]
    types += [route.errors.answer_type for route in routes]
    schemas, parts = msgspec.json.schema_components(types, ref_template=_REFERENCES.format(name=_ANSWER + "{name}"))
    return dict(zip(types, schemas, strict=True)), {_ANSWER + name: part for name, part in parts.items()}


def _responses(route: Route, answers: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Return what an operation answers, whole or as a stream, and how it fails."""
    schema = {"type": "object"} if route.answer_type is None else answers[route.answer_type]
    content: dict[str, Any] = {route.content_type: {"schema": schema} if route.content_type == JSON else {}}
    if "stream" in route.fields():
        content[EVENT_STREAM] = {}
    error = answers[route.errors.answer_type]
    # A probe says in the same form that all is well, and that it is not.
    fault = {"anyOf": [schema, error]} if route.scope is AuthScope.PUBLIC else error
    return {
        "200": {"description": "the answer", "content": content},
        "4XX": {"description": "the request is wrong", "content": {JSON: {"schema": error}}},
        "5XX": {"description": "the server cannot answer now", "content": {JSON: {"schema": fault}}},
    }


def _operation(route: Route, schema: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": route.summary,
        "x-zif-scope": route.scope.value,
    }
    if route.scope is not AuthScope.PUBLIC:
        operation["security"] = [{"bearer": []}, {"key": []}]
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    _, brace, name = route.path.partition("{")
    if brace:
        operation["parameters"] = [
            {"name": name.rstrip("}"), "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation
