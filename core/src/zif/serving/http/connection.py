"""One client's connection: what may come before a request reaches the application, in bytes and in seconds.

Extends uvicorn's protocol over httptools with what it leaves open: the size of headers that are still coming, clients
that never finish them, bodies nobody reads, answers nobody takes, and offers to go on with another protocol.
"""

import asyncio
import logging
import socket
import struct
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from zif.serving.http.corked import CorkedTransport
from zif.serving.http.errors import STATUS_OF, Failure, FailureKind, OpenAIErrors
from zif.serving.http.exchange import JSON
from zif.serving.http.settings import ServeSettings

_MAX_PIPELINED = 16
"""Requests that are held while the one before them is answered (RFC 9112, section 9.3.2)."""

_MAX_PIPELINED_BODY_BYTES = 2**16
"""Of a body whose request waits behind another. It is in memory, and no handler's limit counts it yet."""

_MIN_TAKEN_BYTES = 2**15
"""What a client has to take in `write_timeout_s` while more than a buffer of bytes waits for it."""

_RESET = struct.pack("ii", 1, 0)
"""`struct linger`, socket(7): on, for no time."""

_LOG = logging.getLogger("zif.serving")
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class HeadersTooLargeError(ValueError):
    """The headers of a request exceed the limit; ends the parser, and the connection with it."""


class TooManyPipelinedError(ValueError):
    """More requests wait behind an unanswered one than are held; ends the parser, and the connection with it."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection with limits. The first two attributes are set by `limited_protocol`."""

    limits: ServeSettings
    max_connections: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._num_head_bytes = 0
        self._num_unread_bytes = 0
        self._refusal = Failure(FailureKind.INVALID, "this is no valid HTTP request", code="invalid_http")
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_taken_bytes = 0
        self._answering: RequestResponseCycle | None = None
        self._head_without_offer: bytes | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._corked = CorkedTransport(transport, self.loop)
        super().connection_made(self._corked)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._arm(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_write_timer()
        if self._answering is not None and not self._answering.response_complete:
            # uvicorn tells the newest request only, which may be one that waits behind this one.
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Hear that much waits to be read, whatever route wrote it: from now on the client has to read."""
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            # TLS hands on what comes while the last answer is being sent. Nobody will answer it.
            return
        if self._in_head:
            self._num_head_bytes += len(data)
        elif self._answered():
            self._num_unread_bytes += len(data)
        self._parse(data)
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
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            self._head_without_offer = _head(method, self.url, self.parser.get_http_version(), self.headers)
            return
        self._in_head = False
        self._num_unread_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > _MAX_PIPELINED_BODY_BYTES:
            self.transport.abort()

    def on_message_complete(self) -> None:
        if self._head_without_offer is not None:
            return
        super().on_message_complete()
        self._in_head = True
        self._num_head_bytes = 0
        self._disarm()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits until the client has read; this client may never do so.
            self._watch_reading()
        elif not self._in_head:
            # The rest of the body is read and dropped, so that a client that is still writing gets its answer.
            self._arm(self.limits.body_timeout_s)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reading()

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
        self._watch_reading()

    def _parse(self, data: bytes) -> None:
        """Parse what came, and go on with HTTP/1.1 where a client offers another protocol (RFC 9110, 7.8).

        The parser takes such an offer as the end of HTTP: it passes over the body, which would then be read as the next
        request. A new one gets the same head without the field `upgrade`, and all that follows the head.
        """
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                assert self._head_without_offer is not None, "the parser ends HTTP after the headers of an offer only"
                data = self._head_without_offer + data[offer.args[0] :]
                self._head_without_offer = None
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn does: a request that comes after `connection: close` does not spoil the answer before it.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            except httptools.HttpParserError:
                self.logger.warning("a client sent what is no valid HTTP request, or too much of it")
                self.send_400_response("")
                return

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

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

    def _watch_reading(self) -> None:
        """Look in a while whether the client has taken something, and so on until it has taken enough."""
        if self._write_timer is None:
            self._num_taken_bytes = self._corked.num_taken_bytes()
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._judge_reading)

    def _judge_reading(self) -> None:
        self._write_timer = None
        if self._corked.num_taken_bytes() - self._num_taken_bytes >= _MIN_TAKEN_BYTES:
            self._watch_reading()
            return
        _LOG.info("a client was cut off that did not read for %s s", self.limits.write_timeout_s)
        # Without this the system goes on offering what it has taken, for minutes, from memory of its own.
        if (connected := self.transport.get_extra_info("socket")) is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _head(method: bytes, target: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request without the field `upgrade`."""
    lines = [b"%s %s HTTP/%s" % (method, target, version.encode())]
    lines += [b"%s: %s" % field for field in headers if field[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])


def limited_protocol(settings: ServeSettings, max_connections: int) -> type[asyncio.Protocol]:
    """Return the protocol class of a server with these limits. `max_connections`: what open files allow of them."""
    bound = {"limits": settings, "max_connections": max_connections}
    return cast("type[asyncio.Protocol]", type("BoundProtocol", (LimitedProtocol,), bound))
