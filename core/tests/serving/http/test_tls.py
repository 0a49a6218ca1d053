"""HTTPS: files that fit, files that do not, and a server that uses them."""

import asyncio
import ssl
import subprocess

import pytest

from serving.http.servers import answer_of, get, running
from zif.errors import ConfigError
from zif.serving.http.settings import ServeSettings
from zif.serving.http.sockets import check_tls


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
        check_tls(ServeSettings(tls_certificate=str(certificate[0]), tls_key=str(certificate[1])))

    def test_https_is_served(self, certificate):
        async def ask():
            async with running(tls_certificate=str(certificate[0]), tls_key=str(certificate[1])) as server:
                line = await server.line("ready at https://")
                port = int(line.split(" after")[0].rpartition(":")[2])
                trust = _trusting(certificate[0])
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=trust, server_hostname="localhost"
                )
                writer.write(get("/livez"))
                assert (await answer_of(reader))[0] == 200
                writer.close()

        asyncio.run(ask())

    def test_files_that_do_not(self, certificate, tmp_path):
        chain, key = certificate
        other = tmp_path / "other"
        other.write_text("no key")
        for wrong in ((chain, other), (other, key), (chain, tmp_path / "absent")):
            with pytest.raises(ConfigError, match="tls_"):
                check_tls(ServeSettings(tls_certificate=str(wrong[0]), tls_key=str(wrong[1])))


def _trusting(chain):
    context = ssl.create_default_context(cafile=str(chain))
    context.check_hostname = False
    return context
