"""The server's process: one socket, one event loop, one engine beside it; how it starts, drains and ends.

The socket listens before the engine starts, so that a taken port is seen at once and probes are answered meanwhile.
The first SIGTERM or SIGINT drains: no new work, what is under way ends, for `drain_s` at most. A second one ends at
once. Exit codes: 0 drained, 1 the engine or HTTP failed, 128 + number of the second signal.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import uvicorn

from zif.serving.answers import (
    EngineClient,
    EngineState,
    EngineUnavailableError,
)
from zif.serving.http.app import ServerApp
from zif.serving.http.connection import limited_protocol
from zif.serving.http.open_files import raise_open_files
from zif.serving.http.registry import Route
from zif.serving.http.settings import ResolvedServeSettings, ServeSettings
from zif.serving.http.sockets import close_socket, open_socket, tls_context, url_of
from zif.serving.http.tls import tls_protocol
from zif.serving.page import page_routes
from zif.serving.telemetry.phases import PhaseTimes
from zif.serving.telemetry.wiring import Telemetry

_LOG = logging.getLogger("zif.serving")
_FAILED = 1
_SIGNAL_BASE = 128
_LAST_WORDS_S = 2.0
"""How long those whose requests were interrupted have to read so."""

_FAILURE_CHECK_S = 0.5
_COLLECT_AFTER_OBJECTS = 20_000


class RunningEngine(EngineClient, Protocol):
    """An engine with a beginning and an end, as `zif.serving.engine.client.ProcessEngine` is one."""

    async def start(self) -> None:
        """Begin to start; returns at once."""
        ...

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises `EngineUnavailableError` when they never will be."""
        ...

    async def close(self) -> None:
        """End it, requests under way included."""
        ...


OpenApis = Callable[[EngineClient, ServeSettings], AbstractAsyncContextManager[list[Route]]]


class StopSignals:
    """What tells a server to stop: the first signal asks for a drain, a second one for the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.number = 0

    def install(self) -> None:
        """Hear SIGTERM and SIGINT from now on. For the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.hear, number)

    def hear(self, number: int) -> None:
        """Take one signal."""
        self.number = number
        (self.second if self.first.is_set() else self.first).set()


@dataclass(frozen=True, slots=True)
class ServerParts:
    """What a server is made of besides its settings.

    `say` writes a line for people, without ever waiting for whoever reads it; `phases` has timed the start.
    """

    engine: RunningEngine
    open_apis: OpenApis
    say: Callable[[str], None]
    stop: StopSignals
    phases: PhaseTimes | None = None


async def serve(resolved: ResolvedServeSettings, parts: ServerParts) -> int:
    """Serve until told to stop, and return the exit code. Raises `ConfigError` when it cannot listen."""
    tls = tls_context(resolved.settings)
    listener = open_socket(resolved.settings)
    try:
        return await _Serving(resolved, parts, listener, tls).run()
    finally:
        close_socket(listener, resolved.settings)


class _HttpServer(uvicorn.Server):
    """uvicorn without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _Serving:
    """One run of a server."""

    def __init__(
        self, resolved: ResolvedServeSettings, parts: ServerParts, listener: socket.socket, tls: ssl.SSLContext | None
    ) -> None:
        self._settings = resolved.settings
        self._parts = parts
        self._listener = listener
        self._url = url_of(listener, self._settings)
        self._began_s = time.monotonic()
        self._telemetry = Telemetry(
            parts.engine,
            with_aliases=self._settings.vllm_metrics,
            log_requests=self._settings.log_requests,
            phases=parts.phases,
        )
        early = [*page_routes(), *self._telemetry.routes()]
        self._app = ServerApp(self._telemetry.engine, self._settings, resolved.keys, self._telemetry.observers(), early)
        max_connections = self._fitting_connections()
        protocol = limited_protocol(self._settings, max_connections)
        if tls is not None:
            protocol = tls_protocol(protocol, tls, self._settings, max_connections)
        self._http = _HttpServer(_uvicorn_config(self._app, self._settings, protocol))

    async def run(self) -> int:
        """Start the engine and HTTP, serve, and end both."""
        engine = self._parts.engine
        try:
            await engine.start()
            http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
            try:
                return await self._start_and_serve(http)
            finally:
                await self._end_http(http)
        finally:
            await engine.close()

    def _fitting_connections(self) -> int:
        """Return how many connections are taken: the setting, or less where the system allows no more open files."""
        wanted = self._settings.max_connections
        num_missing = raise_open_files(wanted)
        if not num_missing:
            return wanted
        fitting = max(1, wanted - num_missing)
        self._parts.say(
            f"warning: the limit of open files is too low by {num_missing} for max_connections={wanted}, so {fitting} "
            "are taken; raise it ('ulimit -n', or LimitNOFILE of a service), or lower max_connections"
        )
        return fitting

    async def _end_http(self, http: asyncio.Task[None]) -> None:
        """Close the listener and every connection; what was written has a moment to be read."""
        self._http.should_exit = True
        await asyncio.wait([http], timeout=0 if self._parts.stop.second.is_set() else _LAST_WORDS_S)
        self._http.force_exit = True
        for connection in list(self._http.server_state.connections):
            connection.transport.abort()
        await asyncio.wait([http])
        if not http.cancelled() and (error := http.exception()):
            _LOG.error("HTTP failed", exc_info=error)

    async def _start_and_serve(self, http: asyncio.Task[None]) -> int:
        stop, engine = self._parts.stop, self._parts.engine
        try:
            is_ready = await _first(engine.wait_ready(), stop.first.wait(), asyncio.wait([http]))
            if http.done():
                return self._fail(_ending_of(http))
            if not is_ready:
                return 0
            async with self._parts.open_apis(self._telemetry.engine, self._settings) as routes:
                self._app.install(routes)
                seconds = time.monotonic() - self._began_s
                self._parts.say(f"ready at {self._url} after {seconds:.1f} s")
                with _settled_memory():
                    has_failed = await _first(_failure(engine), stop.first.wait(), asyncio.wait([http]))
                    drained = await self._drain()
        except EngineUnavailableError as error:
            return self._fail(str(error))
        if http.done():
            return self._fail(_ending_of(http))
        if has_failed:
            return self._fail(engine.problem())
        return 0 if drained else _SIGNAL_BASE + stop.number

    def _fail(self, reason: str | None) -> int:
        self._parts.say(f"error: {reason}")
        return _FAILED

    async def _drain(self) -> bool:
        """Let work under way end, and interrupt what takes too long. Return False after a second signal."""
        stop, num_open = self._parts.stop, self._app.status.num_in_flight
        self._app.begin_drain()  # the socket stays open: who comes meanwhile is told, and probes are answered
        if num_open:
            self._parts.say(f"draining: {num_open} requests have {self._settings.drain_s} s to end")
        await _first(self._app.drained(self._settings.drain_s), stop.second.wait())
        self._app.interrupt_all()
        if not stop.second.is_set():
            await self._app.drained(_LAST_WORDS_S)
        return not stop.second.is_set()


@contextlib.contextmanager
def _settled_memory() -> Generator[None, None, None]:
    """Leave what start-up made out of garbage collection, and collect less often what requests make.

    With the interpreter's own threshold of 700 objects collections take an eighth of the loop's time, and a full one
    walks every module.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _ending_of(http: asyncio.Task[None]) -> str:
    """Say why HTTP ended by itself."""
    error = None if http.cancelled() else http.exception()
    return "HTTP ended by itself" if error is None else f"HTTP ended: {type(error).__name__}: {error}"


async def _failure(engine: EngineClient) -> None:
    """Return when the engine has failed for good."""
    while engine.state is not EngineState.FAILED:
        await asyncio.sleep(_FAILURE_CHECK_S)


async def _first(*waits: Coroutine[Any, Any, Any]) -> bool:
    """Wait until one is done and end the others. Return whether the first is; raises what it raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        others = [task for task in tasks if not task.done()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    if tasks[0] in others:
        return False
    tasks[0].result()
    return True


def _uvicorn_config(app: ServerApp, settings: ServeSettings, protocol: type[asyncio.Protocol]) -> uvicorn.Config:
    """Return how uvicorn serves: one worker, our protocol, no headers of proxies believed, no logging of its own."""
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.idle_timeout_s,
    )
