"""A server on a socket: what a connection may do, how it starts, drains and ends."""

import asyncio
import contextlib
import socket

import pytest

from serving.fakes import Script
from serving.http.servers import StartedEngine, answer_of, exchange, get, post, running
from zif.errors import ConfigError
from zif.serving.answers import EngineState
from zif.serving.http.settings import ServeSettings
from zif.serving.http.sockets import close_socket, open_socket


def run(coroutine):
    return asyncio.run(coroutine)


class TestConnections:
    def test_requests_share_a_connection(self):
        async def ask():
            async with running() as server:
                reader, writer = await server.connect()
                for text in ("a", "b"):
                    writer.write(post("/ask", {"text": text}))
                    status, _, body = await answer_of(reader)
                    assert status == 200
                    assert f'"text":"{text}"'.encode() in body
                writer.write(get("/livez") + get("/version"))
                assert [(await answer_of(reader))[0] for _ in range(2)] == [200, 200]

        run(ask())

    def test_no_more_than_some_requests_wait_behind_one(self):
        async def ask():
            gate = asyncio.Event()
            async with running(StartedEngine(Script(gates=[gate]))) as server:
                reader, writer = await server.connect()
                writer.write(post("/ask", {"text": "a"}) + get("/livez") * 1000)
                assert await reader.read() == b"", "the connection is cut off, nothing is held"

        run(ask())

    def test_no_header_tells_the_software(self):
        async def ask():
            async with running() as server:
                _, headers, _ = await exchange(server, get("/livez"))
                assert "server" not in headers

        run(ask())

    @pytest.mark.parametrize(
        "head",
        [
            get("/livez", "x: " + "y" * 20_000),
            get("/livez?" + "y" * 20_000),
            get("/livez", *(f"x{k}: y" for k in range(70))),
            b"GET /livez HTTP/1.1\r\nx: " + b"y" * 20_000,
            b"GET /" + b"y" * 20_000,
        ],
    )
    def test_headers_over_the_limits(self, head):
        async def ask():
            async with running() as server:
                status, headers, body = await exchange(server, head)
                assert (status, headers["connection"]) == (431, "close")
                assert b"16384 bytes or 64 fields" in body
                assert (await exchange(server, get("/livez")))[0] == 200

        run(ask())

    def test_headers_within_the_limits(self):
        async def ask():
            async with running() as server:
                head = get("/livez", "x: " + "y" * 15_000, *(f"x{k}: y" for k in range(60)))
                assert (await exchange(server, head))[0] == 200

        run(ask())

    @pytest.mark.parametrize("junk", [b"\x16\x03\x01\x00\x00", b"GARBAGE\r\n\r\n", b"GET /x HTTP/9.9\r\n\r\n"])
    def test_what_is_no_http(self, junk):
        async def ask():
            async with running() as server:
                status, _, body = await exchange(server, junk)
                assert status == 400
                assert b"no valid HTTP request" in body

        run(ask())

    @pytest.mark.parametrize("head", [b"", b"GET /livez HTTP/1.1\r\nx: y", b"\r\n"])
    def test_a_head_that_never_ends_is_cut_off(self, head):
        async def wait():
            async with running(limits={"header_timeout_s": 0.1}) as server:
                reader, writer = await server.connect()
                writer.write(head)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""

        run(wait())

    def test_a_head_that_never_ends_is_cut_off_on_a_used_connection_too(self):
        async def wait():
            async with running(limits={"header_timeout_s": 0.1}) as server:
                reader, writer = await server.connect()
                writer.write(get("/livez"))
                assert (await answer_of(reader))[0] == 200
                writer.write(b"GET /livez HTT")
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""

        run(wait())

    def test_an_idle_connection_is_closed(self):
        async def wait():
            async with running(limits={"idle_timeout_s": 0.1}) as server:
                reader, writer = await server.connect()
                writer.write(get("/livez"))
                await answer_of(reader)
                assert await reader.read() == b""

        run(wait())

    def test_a_client_still_writing_gets_its_refusal(self):
        async def write():
            async with running(max_body_bytes=2**20) as server:
                reader, writer = await server.connect()
                writer.write(post("/ask", b"x" * (2**20 + 1)))
                status, _, _ = await answer_of(reader)
                await writer.drain()
                assert status == 413
                writer.write(get("/livez"))
                assert (await answer_of(reader))[0] == 200

        run(write())

    def test_a_body_nobody_reads_does_not_go_on_forever(self):
        async def write():
            async with running(max_body_bytes=2**17) as server:
                reader, writer = await server.connect()
                writer.write(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n")
                assert (await answer_of(reader))[0] == 404
                with pytest.raises(ConnectionError):
                    await _write_forever(writer)

        run(write())

    def test_a_body_nobody_reads_does_not_trickle_forever(self):
        async def wait():
            async with running(limits={"body_timeout_s": 0.1}) as server:
                reader, writer = await server.connect()
                writer.write(b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\nx")
                assert (await answer_of(reader))[0] == 404
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""

        run(wait())

    def test_more_connections_than_allowed_are_closed(self):
        async def connect():
            async with running(max_connections=2) as server:
                kept = [await server.connect() for _ in range(2)]
                reader, _ = await server.connect()
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                reader, writer = kept[0]
                writer.write(get("/livez"))
                assert (await answer_of(reader))[0] == 200

        run(connect())


class TestLife:
    def test_probes_are_answered_while_the_engine_starts(self):
        async def start():
            engine = StartedEngine()
            engine.may_start.clear()
            engine.problem_text = "loading weights"
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            async with running(engine, limits={"port": port}) as server:
                reader, writer = await _connect_when_open(server, port)
                for path, expected in (("/livez", 200), ("/readyz", 503), ("/v1/models", 503)):
                    writer.write(get(path))
                    assert (await answer_of(reader))[0] == expected
                engine.problem_text = None
                engine.may_start.set()
                await server.line("ready at")
                writer.write(get("/readyz"))
                assert (await answer_of(reader))[0] == 200

        run(start())

    def test_an_engine_that_does_not_start(self):
        async def start():
            engine = StartedEngine()
            engine.cause = "no such model"
            async with running(engine) as server:
                assert await server.task == 1
                assert server.lines == ["error: no such model"]
                assert engine.events == ["start", "close"]

        run(start())

    def test_an_engine_that_fails_for_good_ends_the_server(self):
        async def fail():
            async with running() as server:
                await server.line("ready at")
                server.engine.state, server.engine.problem_text = EngineState.FAILED, "3 crashes"
                assert await server.task == 1
                assert server.lines[-1] == "error: 3 crashes"

        run(fail())

    def test_a_signal_while_starting_ends_it(self):
        async def stop():
            engine = StartedEngine()
            engine.may_start.clear()
            async with running(engine) as server:
                while not engine.events:
                    await asyncio.sleep(0)
                server.stop.hear(15)
                assert await server.task == 0
                assert engine.events == ["start", "close"]

        run(stop())

    def test_the_first_signal_drains(self):
        async def drain():
            gate = asyncio.Event()
            engine = StartedEngine(Script(gates=[gate]))
            async with running(engine) as server:
                reader, writer = await server.connect()
                writer.write(post("/stream", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                server.stop.hear(15)
                await server.line("draining: 1 requests")
                gate.set()
                assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
                assert await server.task == 0
                assert engine.aborted == []
                assert engine.events == ["start", "ready", "apis closed", "close"]

        run(drain())

    def test_what_does_not_end_in_time_is_told_so(self):
        async def drain():
            engine = StartedEngine(Script(gates=[asyncio.Event()]))
            async with running(engine, drain_s=0) as server:
                reader, writer = await server.connect()
                writer.write(post("/stream", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                server.stop.hear(15)
                assert b"the server shuts down" in await reader.read()
                assert await server.task == 0
                assert engine.submitted[0].aborted

        run(drain())

    @pytest.mark.slow
    def test_clients_that_never_read_do_not_hold_the_end_up(self):
        async def drain():
            engine = StartedEngine(Script(pieces=["x" * 65_536] * 4096))
            async with running(engine, drain_s=0) as server:
                reader, writer = await server.connect()
                reader._transport.pause_reading()
                writer.write(post("/long", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                server.stop.hear(15)
                assert await server.task == 0
                assert engine.submitted[0].aborted

        run(drain())

    def test_a_second_signal_ends_at_once(self):
        async def drain():
            engine = StartedEngine(Script(gates=[asyncio.Event()]))
            async with running(engine, drain_s=1000) as server:
                _, writer = await server.connect()
                writer.write(post("/stream", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                server.stop.hear(15)
                await server.line("draining")
                server.stop.hear(2)
                assert await server.task == 128 + 2

        run(drain())

    def test_metrics_are_served(self):
        async def ask():
            async with running() as server:
                status, _, body = await exchange(server, get("/metrics"))
                assert status == 200
                assert b"zif:num_requests_running" in body

        run(ask())


async def _write_forever(writer):
    while True:
        writer.write(b"x" * 2**16)
        await writer.drain()


async def _connect_when_open(server, port):
    while True:
        with contextlib.suppress(ConnectionError):
            return await server.connect_to(port)
        await asyncio.sleep(0.01)


class TestSockets:
    def test_a_port_in_use(self):
        with open_socket(ServeSettings(port=0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"port={port} of '127.0.0.1' is in use"):
                open_socket(ServeSettings(port=port))

    @pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
    def test_an_address_that_is_not_here(self, host):
        with pytest.raises(ConfigError, match=host):
            open_socket(ServeSettings(host=host, port=0))

    def test_a_unix_socket_is_its_owners_and_goes_at_the_end(self, tmp_path):
        settings = ServeSettings(uds=str(tmp_path / "s"))
        listener = open_socket(settings)
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match="in use"):
            open_socket(settings)
        close_socket(listener, settings)
        assert not (tmp_path / "s").exists()

    def test_a_socket_that_was_left_behind_is_replaced_and_a_file_is_not(self, tmp_path):
        settings = ServeSettings(uds=str(tmp_path / "s"))
        open_socket(settings).close()
        close_socket(open_socket(settings), settings)
        (tmp_path / "s").write_text("mine")
        with pytest.raises(ConfigError, match="no socket"):
            open_socket(settings)
        assert (tmp_path / "s").read_text() == "mine"

    def test_a_path_too_long_for_a_socket(self, tmp_path):
        with pytest.raises(ConfigError, match="107 bytes"):
            open_socket(ServeSettings(uds="/" + "x" * 200))
