"""One client's connection: what may come before a request reaches the application, in bytes and in seconds.

Extends uvicorn's protocol over httptools with what it leaves open: the size of headers that are still coming, clients
that never finish them, bodies nobody reads, and answers nobody takes.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from zif.serving.http.corked import CorkedTransport
from zif.serving.http.errors import STATUS_OF, Failure, FailureKind, OpenAIErrors
from zif.serving.http.exchange import JSON
from zif.serving.http.settings import ServeSettings

_MAX_PIPELINED = 16
"""Requests that are held while the one before them is answered (RFC 9112, section 9.3.2)."""

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class HeadersTooLargeError(ValueError):
    """The headers of a request exceed the limit; ends the parser, and the connection with it."""


class TooManyPipelinedError(ValueError):
    """More requests wait behind an unanswered one than are held; ends the parser, and the connection with it."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection with limits. `limits` is set by `limited_protocol`."""

    limits: ServeSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0
        self._num_unread_bytes = 0
        self._refusal = Failure(FailureKind.INVALID, "this is no valid HTTP request", code="invalid_http")
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CorkedTransport(transport, self.loop))
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._arm(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._num_head_bytes += len(data)
        elif self._answered():
            self._num_unread_bytes += len(data)
        super().data_received(data)
        if self.transport is None or self.transport.is_closing():
            return
        if self._in_head and self._num_head_bytes > self.limits.max_header_bytes:
            self._refuse_headers()
        elif self._num_unread_bytes > self.limits.max_body_bytes:
            self.transport.abort()
        elif self._in_head and self._answered():
            self._arm(self.limits.header_timeout_s)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # How the application cuts a client off that does not read.
        self.scope.setdefault("state", {})["abort_connection"] = self.transport.abort

    def on_headers_complete(self) -> None:
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self.limits.max_header_bytes or len(self.headers) > self.limits.max_headers:
            self._set_too_large()
            raise HeadersTooLargeError
        if len(self.pipeline) >= _MAX_PIPELINED:
            self.transport.abort()
            raise TooManyPipelinedError
        self._in_head = False
        self._num_unread_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._num_head_bytes = 0
        self._disarm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits until the client has read; this client may never do so.
            self._arm(self.limits.write_timeout_s)
        elif not self._in_head:
            # The rest of the body is read and dropped, so that a client that is still writing gets its answer.
            self._arm(self.limits.body_timeout_s)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._arm(self.limits.write_timeout_s)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused, in words of ours, and close."""
        if not self._answered():
            # Another answer is on its way: a second one must not be mixed into it.
            self.transport.abort()
            return
        status = STATUS_OF[self._refusal.kind]
        body = OpenAIErrors().body(self._refusal)
        head = b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, _REASONS[status], JSON.encode(), len(body)) + body)
        self.transport.close()
        self._arm(self.limits.write_timeout_s)

    def _answered(self) -> bool:
        """Say whether no answer is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _set_too_large(self) -> None:
        limits = self.limits
        self._refusal = Failure(
            FailureKind.HEADERS_TOO_LARGE,
            f"the headers exceed {limits.max_header_bytes} bytes or {limits.max_headers} fields; send fewer",
        )

    def _refuse_headers(self) -> None:
        self._set_too_large()
        self.send_400_response("")

    def _arm(self, seconds: float) -> None:
        """End the connection in a while, unless something disarms this first. An earlier end stays."""
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def limited_protocol(settings: ServeSettings) -> type[asyncio.Protocol]:
    """Return the protocol class of a server with these limits."""
    return cast("type[asyncio.Protocol]", type("BoundProtocol", (LimitedProtocol,), {"limits": settings}))
