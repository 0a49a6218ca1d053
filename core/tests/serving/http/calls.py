"""Calls of an ASGI application without a server: what a client sends, what it gets, and when it leaves."""

import asyncio
import json
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict = field(default_factory=dict)
    chunks: list = field(default_factory=list)
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self):
        return json.loads(self.body)


class Call:
    """A request. `parts`: the messages of its body; `leave`: the client goes; `reads` cleared: it does not read."""

    def __init__(self, path, body=None, *, method=None, headers=(), parts=None, query=b""):
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        pairs = {b"host": b"localhost"} | ({b"content-type": b"application/json"} if body is not None else {})
        pairs |= {k.lower().encode(): v.encode("latin-1") for k, v in dict(headers).items()}
        self.scope = {
            "type": "http",
            "method": method or ("GET" if body is None and parts is None else "POST"),
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": list(pairs.items()),
            "state": {},
        }
        self.parts = list(parts) if parts is not None else [content]
        self.answer = Answer()
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.chunk_came = asyncio.Event()

    def leave(self):
        self.gone.set()

    async def receive(self):
        if self.parts:
            part = self.parts.pop(0)
            if isinstance(part, asyncio.Event):
                await part.wait()
                return await self.receive()
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reads.wait()
        if message["type"] == "http.response.start":
            assert self.answer.status == 0, "the answer begins twice"
            self.answer.status = message["status"]
            self.answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            assert self.answer.status, "a part of an answer that has not begun"
            assert not self.answer.ended, "a part of an answer that has ended"
            self.answer.chunks.append(message.get("body", b""))
            self.answer.ended = not message.get("more_body", False)
            self.chunk_came.set()


async def call(app, path, body=None, **options) -> Answer:
    """Make one request and return its answer."""
    request = Call(path, body, **options)
    async with asyncio.timeout(5):
        await app(request.scope, request.receive, request.send)
    return request.answer
