"""The server as one ASGI application: finds the route, checks the caller, reads the body, runs the handler, answers.

A request goes through one place, `Exchange.run`, whatever its route; what goes wrong on the way is written in the
style of its route. The path that decides is `scope["path"]`, decoded once by the HTTP parser, and nothing else.
"""

import asyncio
import logging
import math
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import parse_qsl

from zif.serving.answers import EngineClient
from zif.serving.http.auth import KeyRing
from zif.serving.http.body import BodyBudget, BodyReader, BodyShare, ClientGoneError
from zif.serving.http.errors import ApiError, ErrorStyle, Failure, FailureKind, OpenAIErrors, failure_of
from zif.serving.http.exchange import AuthScope, Caller, Headers, Request, RequestRecord, Response, Stream
from zif.serving.http.health import health_routes
from zif.serving.http.hosts import HostGuard
from zif.serving.http.openapi import openapi_route
from zif.serving.http.registry import Match, Registry, Route, ServerContext, ServerStatus
from zif.serving.http.settings import ServeSettings
from zif.serving.http.sse import Message, Receive, Send, Sender, Watch

Observer = Callable[[RequestRecord], None]
"""Hears of every request when it has ended. Called on the event loop: must not wait."""

_LOG = logging.getLogger("zif.serving")
_ECHOED_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SHOWN_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_SHOWN_FIELDS = 16
_MAX_QUERY_FIELDS = 32
_RETRY_KINDS = (FailureKind.OVERLOADED, FailureKind.UNAVAILABLE, FailureKind.TIMEOUT)
_DRAIN_RETRY_S = 1.0


class ServerApp:
    """An ASGI application over an engine. Until `install` only the server's own routes and `early` ones are there."""

    def __init__(
        self,
        engine: EngineClient,
        settings: ServeSettings,
        keys: KeyRing,
        observers: Sequence[Observer] = (),
        early: Sequence[Route] = (),
    ) -> None:
        self.status = ServerStatus()
        self.observers = list(observers)
        self._engine = engine
        self._settings = settings
        self._keys = keys
        self._hosts = HostGuard(settings, has_keys=bool(keys))
        self._bodies = BodyBudget(settings.max_body_bytes_in_flight)
        self._exchanges: set[Exchange] = set()
        self._readers: dict[tuple[str, str], BodyReader] = {}
        self._early = [*health_routes(), openapi_route(), *early]
        self._set_routes([])

    @property
    def context(self) -> ServerContext:
        """Return what handlers are given."""
        return self._context

    def install(self, routes: Sequence[Route]) -> None:
        """Serve the routes of the APIs beside the server's own. Raises `ValueError` when two are alike."""
        self._set_routes(routes)
        self.status.serving = True

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request. Nothing but HTTP is spoken."""
        if scope["type"] != "http":
            raise ValueError(f"cannot serve {scope['type']!r} connections; HTTP only")
        exchange = Exchange(self, scope, receive, send)
        self._exchanges.add(exchange)
        self.status.num_in_flight += 1
        try:
            await exchange.run()
        finally:
            self.status.num_in_flight -= 1
            self._exchanges.discard(exchange)
            self._observe(exchange.record)

    def begin_drain(self) -> None:
        """Refuse new work from now on; what is under way goes on."""
        self.status.draining = True

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is under way. Return False when that took longer."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while self._exchanges:
            tasks = [exchange.task for exchange in self._exchanges]
            remaining_s = deadline_s - asyncio.get_running_loop().time()
            if remaining_s <= 0:
                return False
            await asyncio.wait(tasks, timeout=remaining_s)
            await asyncio.sleep(0)
        return True

    def interrupt_all(self) -> None:
        """End what is still under way: each request is told that the server shuts down."""
        for exchange in list(self._exchanges):
            exchange.interrupt(ApiError(FailureKind.UNAVAILABLE, "the server shuts down", retry_after_s=_DRAIN_RETRY_S))

    def find(self, path: str, method: str, headers: Headers) -> Match:
        """Return the route of a request. Raises `ApiError` when there is none."""
        match = self._registry.find(path, method)
        if match is not None:
            return match
        # Before anything is told of what there is: that, too, is not for pages of other sites.
        self._hosts.check(headers)
        if not self.status.serving:
            raise ApiError(FailureKind.UNAVAILABLE, "the server is starting", retry_after_s=_DRAIN_RETRY_S)
        methods = self._registry.methods(path)
        if methods:
            raise ApiError(FailureKind.METHOD, f"this path takes {' and '.join(methods)} only")
        raise ApiError(FailureKind.NOT_FOUND, "there is nothing at this path; /openapi.json lists what there is")

    def admit(self, route: Route, headers: Headers) -> Caller:
        """Return who asks. Raises `ApiError` when the caller may not, or when the server takes no more work.

        Raises `OverloadedError` where the engine's queue is full: a body that is not read costs nothing.
        """
        if not route.any_host:
            self._hosts.check(headers)
        is_open = route.scope is AuthScope.METRICS and self._settings.public_metrics
        caller = Caller() if is_open else self._keys.authorize(headers, route.scope)
        if self.status.draining and route.scope is AuthScope.INFERENCE:
            raise ApiError(FailureKind.UNAVAILABLE, "the server shuts down", retry_after_s=_DRAIN_RETRY_S)
        if route.asks_engine:
            self._engine.check_room()
        return caller

    def reader(self, route: Route) -> BodyReader | None:
        """Return what reads the bodies of a route, None where there are none."""
        return self._readers.get((route.path, route.method))

    def body_share(self) -> BodyShare:
        """Return what a request's body will take of what all bodies may, nothing yet."""
        return BodyShare(self._bodies)

    def watch(self, receive: Receive, sender: Sender, on_gone: Callable[[], None]) -> Watch:
        """Return a watch over an exchange, with the server's limits."""
        return Watch(receive, sender, on_gone, self._settings.event_keep_alive_s)

    def _set_routes(self, routes: Sequence[Route]) -> None:
        self._registry = Registry([*self._early, *routes])
        self._context = ServerContext(self._engine, self._settings, self._registry, self.status)
        self._readers = {
            (route.path, route.method): BodyReader(route.request_type, self._settings, route.max_body_bytes)
            for route in self._registry.routes()
            if route.request_type is not None
        }

    def _observe(self, record: RequestRecord) -> None:
        for observer in self.observers:
            try:
                observer(record)
            except Exception:  # an answer that was given is not taken back
                _LOG.exception("an observer of requests failed on request %s", record.request_id)


class Exchange:
    """One request on its way through the server, in the task that is current when it is made."""

    def __init__(self, app: ServerApp, scope: Message, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None, "an exchange runs in a task"
        self.task = task
        self._app = app
        self._scope = scope
        self._receive = receive
        self._headers = Headers(scope["headers"])
        self.record = RequestRecord(secrets.token_hex(16), method=scope["method"])
        self._sender = Sender(send, self.record, self._echoed_id())
        self._errors: ErrorStyle = OpenAIErrors()
        self._ended_by: ApiError | ClientGoneError | None = None
        self._body_share = app.body_share()

    def interrupt(self, reason: ApiError | ClientGoneError) -> None:
        """End the exchange where it waits. Only the first reason counts; one that is answered already goes on."""
        if self._ended_by is None and not (self._sender.complete and isinstance(reason, ApiError)):
            self._ended_by = reason
            self.task.cancel()

    async def run(self) -> None:
        """Answer the request, whatever happens. Only a cancellation from outside leaves."""
        watch: Watch | None = None
        try:
            match = self._app.find(self._scope["path"], self._scope["method"], self._headers)
            route = match.route
            self._errors = route.errors
            self.record.route = route.path
            caller = self._app.admit(route, self._headers)
            request = await self._request(match, caller)
            if route.scope is AuthScope.INFERENCE:
                watch = self._app.watch(self._receive, self._sender, lambda: self.interrupt(ClientGoneError()))
            await self._answer(route, request)
        except asyncio.CancelledError:
            if self._ended_by is None:
                raise
            self.task.uncancel()
            await self._fail(self._ended_by)
        except Exception as error:
            await self._fail(error)
        finally:
            if watch is not None:
                watch.stop()
            self._body_share.release()
            self.record.ended_s = asyncio.get_running_loop().time()

    async def _request(self, match: Match, caller: Caller) -> Request[object]:
        """Return the request as its handler gets it: checked, read and decoded."""
        self.record.tenant = caller.tenant
        self.record.traceparent = self._headers.get("traceparent")
        reader = self._app.reader(match.route)
        body: object = None
        unknown: tuple[str, ...] = ()
        if reader is not None:
            decoded = await reader.read(self._receive, self._headers, self._body_share)
            body, unknown = decoded.value, decoded.unknown_fields
            if unknown:
                shown = [name for name in unknown[:_MAX_SHOWN_FIELDS] if _SHOWN_FIELD.fullmatch(name)]
                self._sender.add_header("zif-unknown-fields", ", ".join(shown) or "unprintable")
        path, query = self._scope["path"], self._query()
        return Request(body, self._headers, caller, self.record, path, query, match.path_value, unknown)

    async def _answer(self, route: Route, request: Request[object]) -> None:
        answer = await route.handler(request, self._app.context)
        if isinstance(answer, Stream):
            self.record.streamed = True
            await self._sender.stream(answer)
        else:
            await self._sender.respond(answer)

    async def _fail(self, error: Exception) -> None:
        """Tell the caller what went wrong, as far as an answer is still possible."""
        if isinstance(error, ClientGoneError):
            self.record.aborted = True
            if abort := self._scope.get("state", {}).get("abort_connection"):
                abort()
            return
        failure = failure_of(error, self.record.request_id)
        self.record.failure = failure.kind.value
        if failure.kind is FailureKind.INTERNAL:
            _LOG.error("request %s on %s failed", self.record.request_id, self.record.route, exc_info=error)
        if self._sender.complete:
            return
        if self._sender.started:
            await self._sender.end(self._errors.frame(failure))
            return
        for name, value in _failure_headers(failure):
            self._sender.add_header(name, value)
        if failure.kind is FailureKind.METHOD:
            self._sender.add_header("allow", ", ".join(self._app.context.registry.methods(self._scope["path"])))
        await self._sender.respond(Response(self._errors.body(failure), self._errors.status(failure)))

    def _query(self) -> dict[str, str]:
        raw = self._scope.get("query_string", b"")
        if not raw:
            return {}
        with suppress(ValueError):
            return dict(parse_qsl(raw.decode("latin-1"), max_num_fields=_MAX_QUERY_FIELDS))
        raise ApiError(FailureKind.INVALID, f"the query has more than {_MAX_QUERY_FIELDS} fields; leave some out")

    def _echoed_id(self) -> str:
        """Return the id that the answer carries: the client's where it is harmless, else ours."""
        given = self._headers.get("x-request-id")
        if given is None or not _ECHOED_ID.fullmatch(given):
            return self.record.request_id
        self.record.client_request_id = given
        return given


def build_app(
    engine: EngineClient,
    settings: ServeSettings,
    routes: Sequence[Route],
    keys: KeyRing | None = None,
    observers: Sequence[Observer] = (),
) -> ServerApp:
    """Return an application that serves the routes of the APIs from the start, over an engine that is running."""
    app = ServerApp(engine, settings, KeyRing() if keys is None else keys, observers)
    app.install(routes)
    return app


def _failure_headers(failure: Failure) -> list[tuple[str, str]]:
    """Return the headers that tell a client whether and when to try again.

    `retry-after` is of RFC 9110, 10.2.3; the other two are what OpenAI's client library reads.
    """
    headers = [("x-should-retry", "true" if failure.kind in _RETRY_KINDS else "false")]
    if failure.retry_after_s is not None:
        headers.append(("retry-after", str(max(1, math.ceil(failure.retry_after_s)))))
        headers.append(("retry-after-ms", str(max(1, math.ceil(failure.retry_after_s * 1000)))))
    if failure.kind is FailureKind.AUTHENTICATION:
        headers.append(("www-authenticate", "Bearer"))
    if failure.kind is FailureKind.TIMEOUT:
        headers.append(("connection", "close"))
    return headers
