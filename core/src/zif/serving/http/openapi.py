"""The OpenAPI document of a server, generated from its routes and their request types.

Source: OpenAPI Specification 3.1.
"""

from typing import Any

import msgspec

from zif import __version__
from zif.serving.http.exchange import JSON, AuthScope, Request, Response, json_response
from zif.serving.http.registry import Registry, Route, ServerContext

_REFERENCES = "#/components/schemas/{name}"


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
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        schema = None if route.request_type is None else schema_of[route.request_type]
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "zif", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: Route, schema: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{route.path.replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": route.summary,
        "responses": {"200": {"description": "the answer"}, "default": {"description": "an error"}},
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
