"""A whole server over an engine that is a script, on a free port of this machine, within the test's event loop."""

import asyncio
import contextlib
import json

from serving.fakes import FakeEngine
from serving.http.apis import AskApi
from zif.serving.answers import EngineState, EngineUnavailableError
from zif.serving.http.auth import KeyRing
from zif.serving.http.server import ServerParts, StopSignals, serve
from zif.serving.http.settings import ResolvedServeSettings, ServeSettings


class StartedEngine(FakeEngine):
    """A scripted engine with a beginning and an end. It starts when `may_start` is set; `cause` makes it fail."""

    def __init__(self, *args):
        super().__init__(*args)
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.cause = None
        self.events = []

    async def start(self):
        self.events.append("start")

    async def wait_ready(self):
        await self.may_start.wait()
        if self.cause is not None:
            self.state = EngineState.FAILED
            raise EngineUnavailableError(self.cause)
        self.events.append("ready")

    async def close(self):
        self.events.append("close")


class Running:
    """A server that runs: its port, its lines, the signals to send it, and its exit code when it has ended."""

    def __init__(self, engine, settings):
        self.engine = engine
        self.settings = settings
        self.api = AskApi()
        self.lines = []
        self.writers = []
        self.stop = StopSignals()
        self._said = asyncio.Event()
        parts = ServerParts(engine, self._open, self._say, self.stop)
        self.task = asyncio.create_task(serve(ResolvedServeSettings(settings, KeyRing()), parts))

    @contextlib.asynccontextmanager
    async def _open(self, engine, settings):
        try:
            yield self.api.routes()
        finally:
            self.engine.events.append("apis closed")

    def _say(self, line):
        self.lines.append(line)
        self._said.set()

    async def line(self, word):
        """Wait for a line with a word in it and return it."""
        while not any(word in line for line in self.lines):
            self._said.clear()
            waits = [asyncio.ensure_future(self._said.wait()), self.task]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self.task.done() and not any(word in line for line in self.lines):
                raise AssertionError(f"the server ended with {self.task.result()} and said {self.lines}")
        return next(line for line in self.lines if word in line)

    async def connect(self):
        return await self.connect_to(await self.port())

    async def port(self):
        """Wait until the server is ready and return its port."""
        return int((await self.line("ready at")).split(" after")[0].rpartition(":")[2])

    async def connect_to(self, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.writers.append(writer)
        return reader, writer


@contextlib.asynccontextmanager
async def running(engine=None, limits=(), **settings):
    """Run a server. `limits` are settings below what the command line allows, such as parts of a second."""
    chosen = ServeSettings(port=0, log_requests=False, **settings)
    for name, value in dict(limits).items():
        object.__setattr__(chosen, name, value)
    server = Running(engine or StartedEngine(), chosen)
    try:
        async with asyncio.timeout(20):
            yield server
    finally:
        for writer in server.writers:
            writer.transport.abort()
        server.stop.hear(15)
        server.stop.hear(15)
        await asyncio.wait([server.task], timeout=10)
        assert server.task.done(), "the server did not end"


def post(path, body, *headers):
    """Return the bytes of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(content)}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


def get(path, *headers):
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


async def answer_of(reader):
    """Read one answer that says its length and return (status, headers, body)."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else b""
    return int(head[0].split()[1]), headers, body


async def exchange(server, request):
    """Make one request on a connection of its own and return its answer."""
    reader, writer = await server.connect()
    writer.write(request)
    answer = await answer_of(reader)
    writer.close()
    return answer
