"""HTTPS: files that fit, files that do not, and a server that uses them."""

import asyncio
import contextlib
import ssl
import subprocess

import pytest

from serving.http.servers import answer_of, get, running
from zif.errors import ConfigError
from zif.serving.http.settings import ServeSettings
from zif.serving.http.sockets import tls_context


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "chain.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", chain], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return chain, key


class TestTls:
    def test_files_that_fit(self, certificate):
        tls_context(ServeSettings(tls_certificate=str(certificate[0]), tls_key=str(certificate[1])))

    def test_https_is_served(self, certificate):
        async def ask():
            async with served(certificate) as server:
                assert "ready at https://" in await server.line("ready at")
                port = await server.port()
                trust = _trusting(certificate[0])
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=trust, server_hostname="localhost"
                )
                writer.write(get("/livez"))
                assert (await answer_of(reader))[0] == 200
                writer.close()

        asyncio.run(ask())

    def test_a_request_that_comes_with_the_end_of_the_handshake(self, certificate):
        async def ask():
            async with served(certificate) as server:
                trust, incoming, outgoing = _trusting(certificate[0]), ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = trust.wrap_bio(incoming, outgoing, server_hostname="localhost")
                reader, writer = await asyncio.open_connection("127.0.0.1", await server.port())
                while True:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.do_handshake()
                        break
                    writer.write(outgoing.read())
                    incoming.write(await reader.read(2**16))
                tls.write(get("/livez", "connection: close"))
                writer.write(outgoing.read())  # one segment: the client's last message of the handshake, and a request
                answer = b""
                while b"200 OK" not in answer:
                    incoming.write(await reader.read(2**16))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        answer += tls.read(2**16)
                writer.close()

        asyncio.run(ask())

    def test_handshakes_count_as_connections(self, certificate):
        async def connect():
            async with served(certificate, max_connections=2) as server:
                port = await server.port()
                silent = [await server.connect_to(port) for _ in range(2)]
                reader, _ = await server.connect_to(port)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b"", "one too many is closed at once"
                for _, writer in silent:
                    writer.close()
                reader, writer = await _ask_until_let_in(port, certificate[0])
                assert (await answer_of(reader))[0] == 200
                writer.close()

        asyncio.run(connect())

    @pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
    def test_a_handshake_that_never_ends_is_cut_off(self, certificate, sent):
        async def wait():
            async with served(certificate, limits={"header_timeout_s": 0.2}) as server:
                reader, writer = await server.connect_to(await server.port())
                writer.write(sent)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""

        asyncio.run(wait())

    def test_what_is_no_handshake_harms_nobody(self, certificate):
        async def ask():
            async with served(certificate) as server:
                port = await server.port()
                reader, writer = await server.connect_to(port)
                writer.write(get("/livez"))
                with contextlib.suppress(ConnectionError):
                    assert b"HTTP/1.1" not in await reader.read()
                reader, writer = await _ask_until_let_in(port, certificate[0])
                assert (await answer_of(reader))[0] == 200
                writer.close()

        asyncio.run(ask())

    def test_a_handshake_under_way_does_not_hold_the_end_up(self, certificate):
        async def end():
            async with served(certificate) as server:
                await server.connect_to(await server.port())
                server.stop.hear(15)
                assert await server.task == 0

        asyncio.run(end())

    def test_files_that_do_not(self, certificate, tmp_path):
        chain, key = certificate
        other = tmp_path / "other"
        other.write_text("no key")
        for wrong in ((chain, other), (other, key), (chain, tmp_path / "absent")):
            with pytest.raises(ConfigError, match="tls_"):
                tls_context(ServeSettings(tls_certificate=str(wrong[0]), tls_key=str(wrong[1])))


def served(certificate, **settings):
    return running(tls_certificate=str(certificate[0]), tls_key=str(certificate[1]), **settings)


async def _ask_until_let_in(port, chain):
    """Ask over TLS, again while the server has not yet seen that others are gone."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=_trusting(chain), server_hostname="localhost"
            )
            writer.write(get("/livez"))
            return reader, writer
        await asyncio.sleep(0.01)


def _trusting(chain):
    context = ssl.create_default_context(cafile=str(chain))
    context.check_hostname = False
    return context
