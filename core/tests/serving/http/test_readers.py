"""Clients that leave, that read slowly, or that do not read: what of theirs is held, and for how long."""

import asyncio
import contextlib

import pytest

from serving.fakes import Script
from serving.http.apis import NUM_BIG_BYTES
from serving.http.servers import StartedEngine, exchange, get, post, running


def run(coroutine):
    return asyncio.run(coroutine)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


class TestLeaving:
    def test_a_client_that_leaves_in_a_stream_is_noticed_at_once(self):
        async def leave():
            engine = StartedEngine(Script(gates=[asyncio.Event()]))
            async with running(engine) as server:
                _, writer = await server.connect()
                writer.write(post("/stream", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                writer.close()
                await engine.submitted[0].ended.wait()
                assert engine.submitted[0].aborted

        run(leave())


class TestReading:
    def test_a_client_that_never_reads_is_cut_off_and_its_memory_bounded(self):
        async def stall():
            engine = StartedEngine(Script(pieces=["x" * 65_536] * 4096))
            async with running(engine, limits={"write_timeout_s": 0.2}) as server:
                reader, writer = await server.connect()
                reader._transport.pause_reading()
                writer.write(post("/long", {"text": "x"}))
                while not engine.submitted:
                    await asyncio.sleep(0.001)
                await engine.submitted[0].ended.wait()
                assert engine.submitted[0].aborted
                assert engine.submitted[0].num_deltas < 400, "what nobody reads is not made"
                assert (await exchange(server, get("/livez")))[0] == 200

        run(stall())

    @pytest.mark.parametrize("num_requests", [1, 2])
    @pytest.mark.parametrize("headers", [(), ("connection: close",)])
    def test_answers_that_are_no_inference_do_not_wait_for_ever_either(self, caplog, num_requests, headers):
        async def stall():
            with caplog.at_level("INFO", "zif.serving"):
                async with running(limits={"write_timeout_s": 0.1}) as server:
                    reader, writer = await server.connect()
                    reader._transport.pause_reading()
                    writer.write(get("/big") * (num_requests - 1) + get("/big", *headers))
                    await until(lambda: any("did not read" in message for message in caplog.messages))
                    reader._transport.resume_reading()
                    num_bytes = 0
                    with contextlib.suppress(ConnectionError):
                        while piece := await reader.read(2**20):
                            num_bytes += len(piece)
                    assert num_bytes < NUM_BIG_BYTES

        run(stall())

    def test_who_reads_slowly_but_steadily_gets_everything(self):
        async def read():
            async with running(limits={"write_timeout_s": 0.2}) as server:
                reader, writer = await server.connect()
                writer.write(get("/big", "connection: close"))
                num_bytes = 0
                while piece := await reader.read(2**19):
                    num_bytes += len(piece)
                    if num_bytes % 2**19 < len(piece):
                        await asyncio.sleep(0.02)  # the client's own slowness; the whole takes several times the limit
                assert num_bytes > NUM_BIG_BYTES

        run(read())

    def test_bodies_behind_an_unanswered_request_are_not_held(self):
        async def push():
            engine = StartedEngine(Script(gates=[asyncio.Event()]))
            async with running(engine) as server:
                reader, writer = await server.connect()
                writer.write(post("/stream", {"text": "x"}))
                await until(lambda: engine.submitted)
                writer.write(post("/ask", b"x" * 2**18))
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b"", "the connection is cut off"
                await engine.submitted[0].ended.wait()

        run(push())
