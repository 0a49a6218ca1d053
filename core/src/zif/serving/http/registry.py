"""Every route of the server, declared: path, method, auth scope, body limit, request type, handler.

What is not declared is not served: there is no default scope, and a route that leaves one out cannot be made.
An API package makes a list of routes, whose handlers are methods of an object that holds its services:

    class Score(msgspec.Struct, forbid_unknown_fields=False):
        text: Annotated[str, msgspec.Meta(max_length=65536)]
        model: str | None = None
        user: str | None = None

    class ScoreApi:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self._tokenizer = tokenizer

        def routes(self) -> list[Route]:
            return [
                Route(
                    "/v1/score", "POST", AuthScope.INFERENCE, self.score, Score,
                    summary="Score a text",
                    no_effect={"user": "callers are told apart by their keys"},
                )
            ]

        async def score(self, request: Request[Score], context: ServerContext) -> Response | Stream:
            if not request.body.text:
                raise ApiError(FailureKind.INVALID, "'text' is empty; give some", param="text")
            return json_response({"length": len(request.body.text)})

The body was read, bounded and decoded before the handler runs: a wrong type or a value out of the bounds of `Meta` is
answered 400 with the field's name. Top-level keys that the struct does not have are in `request.unknown_fields`; in
strict mode they are answered 400. A path may end in `{name}`, which takes all that is left of it:
`/v1/models/{model}`.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from zif.serving.answers import EngineClient
from zif.serving.http.errors import ErrorStyle, OpenAIErrors
from zif.serving.http.exchange import JSON, AuthScope, Request, Response, Stream
from zif.serving.http.settings import ServeSettings

_PATH = re.compile(r"/[a-zA-Z0-9_./-]*(?:(?<=/)\{[a-z_]+\})?")


@dataclass(slots=True)
class ServerStatus:
    """How a server stands: what it works on, whether its APIs are there yet, and whether it still takes more."""

    num_in_flight: int = 0
    serving: bool = False
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What every handler may use besides the services of its own API."""

    engine: EngineClient
    settings: ServeSettings
    registry: "Registry"
    status: ServerStatus


Handler = Callable[[Request[Any], ServerContext], Awaitable[Response | Stream]]


@dataclass(frozen=True, slots=True)
class Route:
    """One path and method. `request_type` None: there is no body, and none is read.

    `max_body_bytes` None takes the server's limit. `no_effect` lists the fields of the request type that are accepted
    and change nothing, each with its reason, and parts of fields as "tools.strict"; `/props` shows them. `hidden`
    leaves a route out of the OpenAPI document. `asks_engine` says that the engine's queue takes every request of the
    route: while it is full they are refused before their bodies are read. `answer_type` is what its whole answers hold,
    for the document; None: some JSON object. A route whose request type has a field "stream" has streams, too.
    `any_host` answers under every name, also where `allowed_hosts` lists some: orchestrators probe addresses, which no
    list knows. Only for answers that a page of another site may read.
    """

    path: str
    method: Literal["GET", "POST", "DELETE"]
    scope: AuthScope
    handler: Handler
    request_type: type[msgspec.Struct] | None = None
    max_body_bytes: int | None = None
    errors: ErrorStyle = field(default_factory=OpenAIErrors)
    no_effect: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""
    hidden: bool = False
    asks_engine: bool = False
    any_host: bool = False
    answer_type: Any = None
    content_type: str = JSON

    def __post_init__(self) -> None:
        if not isinstance(self.scope, AuthScope):
            raise TypeError(f"route {self.path!r}: scope={self.scope!r} is none of {[s.value for s in AuthScope]}")
        if not _PATH.fullmatch(self.path) or "//" in self.path or "/." in self.path:
            raise ValueError(f"route {self.path!r}: no plain path; only the last part may be a {{name}}")
        if self.method == "GET" and self.request_type is not None:
            raise ValueError(f"route {self.path!r}: a GET has no body; use POST or leave the request type out")
        unknown = sorted(name for name in self.no_effect if name.partition(".")[0] not in self.fields())
        if unknown:
            raise ValueError(f"route {self.path!r}: no_effect names {unknown}, which the request type does not have")

    def fields(self) -> tuple[str, ...]:
        """Return the keys of the body, as they are spelled in JSON."""
        return () if self.request_type is None else tuple(self.request_type.__struct_encode_fields__)


@dataclass(frozen=True, slots=True)
class Match:
    """The route for a path and method, and what stood for its `{name}`."""

    route: Route
    path_value: str = ""


class Registry:
    """The routes of a server, found by path and method."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Take all routes at once. Raises `ValueError` when two have the same path and method."""
        self._routes = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefixes: dict[str, dict[str, Route]] = {}
        for route in self._routes:
            prefix, brace, _ = route.path.partition("{")
            methods = (self._prefixes if brace else self._exact).setdefault(prefix, {})
            if route.method in methods:
                raise ValueError(f"route {route.path!r}: {route.method} is declared twice")
            methods[route.method] = route

    def routes(self) -> tuple[Route, ...]:
        """Return every route, in the order of declaration."""
        return self._routes

    def find(self, path: str, method: str) -> Match | None:
        """Return the route of a decoded path; a HEAD finds the GET. None when there is none."""
        wanted = "GET" if method == "HEAD" else method
        if exact := self._exact.get(path):
            route = exact.get(wanted)
            return None if route is None else Match(route)
        for prefix, methods in self._prefixes.items():
            if path.startswith(prefix) and len(path) > len(prefix) and wanted in methods:
                return Match(methods[wanted], path[len(prefix) :])
        return None

    def methods(self, path: str) -> list[str]:
        """Return the methods that a path has: none when nothing is there."""
        found = set(self._exact.get(path, {}))
        for prefix, methods in self._prefixes.items():
            if path.startswith(prefix) and len(path) > len(prefix) and path not in self._exact:
                found |= set(methods)
        return sorted(found)
