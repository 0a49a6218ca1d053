"""A server whose parts end by themselves: it ends too, says why, and leaves no engine."""

import asyncio

import pytest

from serving.http.servers import StartedEngine, running
from zif.serving.http import server as server_module


def run(coroutine):
    return asyncio.run(coroutine)


@pytest.fixture
def broken_http(monkeypatch):
    """Return an event that makes HTTP fail when it is set."""
    breaks = asyncio.Event()

    async def main_loop(self):
        await breaks.wait()
        raise OSError("no buffers")

    monkeypatch.setattr(server_module._HttpServer, "main_loop", main_loop)
    return breaks


class TestHttp:
    def test_its_failure_is_the_servers(self, broken_http):
        async def fail():
            async with running() as server:
                await server.line("ready at")
                broken_http.set()
                assert await server.task == 1
                assert server.lines[-1] == "error: HTTP ended: OSError: no buffers"
                assert server.engine.events == ["start", "ready", "apis closed", "close"]

        run(fail())

    def test_its_failure_while_the_engine_starts_does_not_wait_for_it(self, broken_http):
        async def fail():
            engine = StartedEngine()
            engine.may_start.clear()
            async with running(engine) as server:
                broken_http.set()
                assert await server.task == 1
                assert server.lines == ["error: HTTP ended: OSError: no buffers"]
                assert engine.events == ["start", "close"]

        run(fail())

    def test_an_end_without_a_reason_is_one_too(self, monkeypatch):
        async def return_at_once(self):
            pass

        async def end():
            monkeypatch.setattr(server_module._HttpServer, "main_loop", return_at_once)
            async with running() as server:
                assert await server.task == 1
                assert server.lines[-1] == "error: HTTP ended by itself"

        run(end())

    def test_a_failure_at_the_end_does_not_keep_the_engine(self, monkeypatch, caplog):
        async def shutdown(self, sockets=None):
            raise OSError("no end")

        async def end():
            monkeypatch.setattr(server_module._HttpServer, "shutdown", shutdown)
            async with running() as server:
                await server.line("ready at")
                server.stop.hear(15)
                assert await server.task == 0
                assert server.engine.events[-1] == "close"
            assert "HTTP failed" in caplog.messages

        run(end())


def test_an_engine_that_cannot_be_started_is_closed():
    class Broken(StartedEngine):
        async def start(self):
            raise OSError("no processes")

    async def start():
        engine = Broken()
        async with running(engine) as server:
            with pytest.raises(OSError, match="no processes"):
                await server.task
            assert engine.events == ["close"]

    run(start())
