"""Calls of the server's application in this process: no socket, no HTTP on a wire, the same routes and handlers."""

import asyncio
from dataclasses import dataclass, field

import msgspec

from zif.serving.batch.answer_lines import HttpAnswer
from zif.serving.http.app import ServerApp
from zif.serving.http.errors import FailureKind
from zif.serving.http.exchange import JSON, AuthScope, RequestRecord
from zif.serving.http.sse import Message

_PASSING = (FailureKind.UNAVAILABLE.value, FailureKind.OVERLOADED.value)
_HEADERS = [(b"host", b"localhost"), (b"content-type", JSON.encode())]


@dataclass(frozen=True, slots=True)
class AppAnswer:
    """What the application answered, and its record of the request."""

    answer: HttpAnswer
    record: RequestRecord
    unknown_fields: tuple[str, ...]

    @property
    def may_differ_later(self) -> bool:
        """Say whether it is the engine's state, and not the request, that the answer is about."""
        return self.record.failure in _PASSING


class AppCaller:
    """Asks an application. `paths` are those of requests that a model answers."""

    def __init__(self, app: ServerApp) -> None:
        self._app = app
        self._records: dict[str, RequestRecord] = {}
        app.observers.append(self._observe)
        routes = app.context.registry.routes()
        self.paths = frozenset(
            route.path for route in routes if route.method == "POST" and route.scope is AuthScope.INFERENCE
        )

    async def post(self, path: str, body: bytes) -> AppAnswer:
        """Send a body to a route and return its whole answer."""
        call = _Call(body)
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [*_HEADERS, (b"content-length", b"%d" % len(body))],
            "state": {},
        }
        await self._app(scope, call.receive, call.send)
        request_id = call.headers["x-request-id"]
        unknown = tuple(filter(None, call.headers.get("zif-unknown-fields", "").split(", ")))
        answer = HttpAnswer(call.status, request_id, _as_one_line(call))
        return AppAnswer(answer, self._records.pop(request_id), unknown)

    def _observe(self, record: RequestRecord) -> None:
        self._records[record.request_id] = record


@dataclass(slots=True)
class _Call:
    """Both ends of one ASGI call, for an application that has the whole body at once and a client that never leaves."""

    body: bytes | None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    async def receive(self) -> Message:
        body, self.body = self.body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self.parts.append(message.get("body", b""))


def _as_one_line(call: _Call) -> msgspec.Raw:
    """Return a body as JSON that stands within a line."""
    body = b"".join(call.parts)
    if call.headers.get("content-type") != JSON:
        return msgspec.Raw(msgspec.json.encode(body.decode("utf-8", "replace")))
    return msgspec.Raw(msgspec.json.format(body, indent=-1) if b"\n" in body else body)
