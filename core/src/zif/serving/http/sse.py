"""Sending: whole answers and streams of server-sent events over ASGI, and the watch over who still listens.

Nothing is buffered here: a frame is handed to the connection before the next is asked for, so that a client that reads
slowly slows its own request down and nobody else's, and memory per stream is the connection's own buffer.
Source: the event-stream format of the HTML standard, section 9.2.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from zif.serving.http.exchange import EVENT_STREAM, RequestRecord, Response, Stream

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]

WATCH_AFTER_S = 0.05
"""Most requests of a busy server end sooner; only the others get a task that waits for their client to leave."""

_STREAM_HEADERS = (
    (b"content-type", f"{EVENT_STREAM}; charset=utf-8".encode()),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Sender:
    """The sending side of one exchange: what has been sent, since when it is quiet, since when it is stuck."""

    def __init__(self, send: Send, record: RequestRecord, echoed_id: str) -> None:
        self._send = send
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._headers = [(b"x-request-id", echoed_id.encode("latin-1")), (b"x-content-type-options", b"nosniff")]
        self._stream: Stream | None = None
        self.started = False
        self.complete = False
        self.quiet_since_s = self._loop.time()
        self.stuck_since_s: float | None = None

    def add_header(self, name: str, value: str) -> None:
        """Add a header to the answer. Has no effect once that has begun."""
        self._headers.append((name.encode("latin-1"), value.encode("latin-1")))

    async def respond(self, response: Response) -> None:
        """Send a whole answer."""
        headers = [
            (b"content-type", response.content_type.encode("latin-1")),
            (b"content-length", b"%d" % len(response.body)),
            *_encoded(response.headers),
        ]
        self.complete = True
        await self._start(response.status, headers)
        await self._transmit({"type": "http.response.body", "body": response.body, "more_body": False})

    async def stream(self, stream: Stream) -> None:
        """Send frames as they come. Whatever ends it, the frames' generator is closed when this returns."""
        self._stream = stream
        async with contextlib.aclosing(stream.frames) as frames:
            async for frame in frames:
                await self.frame(frame)
        await self.end()

    async def frame(self, frame: bytes) -> None:
        """Send one frame, after the head of the answer when it is the first."""
        if not self.started:
            await self._start_stream()
        await self._transmit({"type": "http.response.body", "body": frame, "more_body": True})

    async def end(self, last_frame: bytes = b"") -> None:
        """End a stream."""
        self.complete = True
        if not self.started:
            await self._start_stream()
        await self._transmit({"type": "http.response.body", "body": last_frame, "more_body": False})

    async def keep_alive(self) -> None:
        """Send a comment where a stream is under way or expected; clients and proxies then go on waiting."""
        if self._stream is not None and not self.complete and self.stuck_since_s is None:
            await self.frame(self._stream.keep_alive)

    async def _start_stream(self) -> None:
        own = self._stream.headers if self._stream is not None else {}
        await self._start(200, [*_STREAM_HEADERS, *_encoded(own)])

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        self._record.status = status
        self._record.responded_s = self._loop.time()
        await self._transmit({"type": "http.response.start", "status": status, "headers": headers + self._headers})

    async def _transmit(self, message: Message) -> None:
        self.stuck_since_s = self._loop.time()
        await self._send(message)
        self.stuck_since_s = None
        self.quiet_since_s = self._loop.time()


class Watch:
    """Watches over an exchange that lasts: its client leaves, or waits in silence.

    `on_gone` is called once, when the client has left. One that does not read leaves too: its connection ends it.
    """

    def __init__(self, receive: Receive, sender: Sender, on_gone: Callable[[], None], keep_alive_s: float) -> None:
        self._receive = receive
        self._sender = sender
        self._on_gone = on_gone
        self._keep_alive_s = keep_alive_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._begin)

    def stop(self) -> None:
        """Stop watching: the exchange has ended."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._run())

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._next_s()):
                    message = await self._receive()
            except TimeoutError:
                await self._check()
                continue
            if message["type"] == "http.disconnect":
                break
        if not self._sender.complete or self._sender.stuck_since_s is not None:
            self._on_gone()

    def _next_s(self) -> float:
        """Return when to look again, on the loop's clock."""
        return self._sender.quiet_since_s + self._keep_alive_s

    async def _check(self) -> None:
        """Send a comment if the stream was quiet for long."""
        if self._loop.time() >= self._next_s():
            await self._sender.keep_alive()
            self._sender.quiet_since_s = self._loop.time()


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
