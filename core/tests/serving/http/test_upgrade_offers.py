"""Clients that offer another protocol: answered in HTTP/1.1, and each byte is of the request that it came in."""

import asyncio

import pytest

from serving.fakes import Script
from serving.http.servers import StartedEngine, answer_of, get, post, running

BODY = b'{"text":"hello"}'
OFFERS = {
    "h2c": ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"],
    "websocket": ["connection: keep-alive, upgrade", "upgrade: websocket", "sec-websocket-version: 13"],
}
CHUNKED = b"%x\r\n%s\r\n9\r\n%s\r\n0\r\n\r\n" % (len(BODY) - 9, BODY[:-9], BODY[-9:])


def chunked(*headers):
    fields = ["host: localhost", "content-type: application/json", "transfer-encoding: chunked", *headers]
    return "\r\n".join(["POST /ask HTTP/1.1", *fields, "", ""]).encode() + CHUNKED


def pieces(data, size):
    return [data[k : k + size] for k in range(0, len(data), size)]


async def talk(server, *sent):
    """Send the pieces one by one on one connection; return its reader."""
    reader, writer = await server.connect()
    for piece in sent:
        writer.write(piece)
        await asyncio.sleep(0.001)
    return reader


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("size", [7, 60, 4096])
def test_they_are_answered_as_without_the_offer(offer, size):
    sent = post("/ask", BODY, *offer) + chunked(*offer) + get("/livez", *offer) + post("/ask", BODY)

    async def ask():
        async with running() as server:
            reader = await talk(server, *pieces(sent, size))
            answers = [await answer_of(reader) for _ in range(4)]
            assert [status for status, _, _ in answers] == [200] * 4
            assert [b'"text":"hello"' in body for _, _, body in answers] == [True, True, False, True]
            assert [request.body.text for request in server.api.requests] == ["hello"] * 3

    asyncio.run(ask())


@pytest.mark.parametrize("wait", [b"", get("/livez")])
def test_a_body_is_never_the_next_request(wait):
    async def ask():
        async with running() as server:
            inner = get("/livez", "x-request-id: smuggled")
            head, _, body = post("/ask", inner, *OFFERS["h2c"]).partition(b"\r\n\r\n")
            reader = await talk(server, wait, head + b"\r\n\r\n", body, get("/livez", "x-request-id: last"))
            answers = [await answer_of(reader) for _ in range(2 + bool(wait))]
            assert [status for status, _, _ in answers][-2:] == [400, 200]
            assert answers[-1][1]["x-request-id"] == "last"

    asyncio.run(ask())


def test_one_may_wait_behind_another_answer_and_end_the_connection():
    async def ask():
        gate = asyncio.Event()
        async with running(StartedEngine(Script(gates=[gate]))) as server:
            last = post("/ask", BODY, "connection: close, upgrade", "upgrade: h2c")
            reader = await talk(server, post("/ask", BODY) + last)
            gate.set()
            assert [(await answer_of(reader))[0] for _ in range(2)] == [200, 200]
            assert await reader.read() == b""

    asyncio.run(ask())


def test_they_count_as_others_do():
    async def ask():
        gate = asyncio.Event()
        async with running(StartedEngine(Script(gates=[gate]))) as server:
            reader = await talk(server, post("/ask", BODY) + get("/livez", *OFFERS["h2c"]) * 1000)
            assert await reader.read() == b"", "the connection is cut off, nothing is held"
            reader = await talk(server, get("/livez", *OFFERS["h2c"], "x: " + "y" * 20_000))
            assert (await answer_of(reader))[0] == 431

    asyncio.run(ask())


@pytest.mark.parametrize("offer", [[], OFFERS["h2c"]])
def test_nothing_is_tunnelled(offer):
    async def ask():
        async with running() as server:
            head = "\r\n".join(["CONNECT localhost:80 HTTP/1.1", "host: localhost", *offer, "", ""]).encode()
            reader = await talk(server, head + get("/livez"))
            status, headers, _ = await answer_of(reader)
            assert (status, headers["connection"]) == (400, "close")
            assert await reader.read() == b""

    asyncio.run(ask())
