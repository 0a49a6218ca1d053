"""Names that a server answers to: a page that points its own name at this machine gets nothing."""

import asyncio

import pytest

from serving.fakes import FakeEngine
from serving.http.apis import AskApi, make_app
from serving.http.calls import call
from serving.http.servers import exchange, running
from zif.errors import ConfigError
from zif.serving.http.auth import parse_keys
from zif.serving.http.exchange import Headers
from zif.serving.http.hosts import HostGuard
from zif.serving.http.settings import ServeSettings

KEYS = parse_keys(["some-key-1"])
OURS = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.:80",
    "app.localhost",
    "127.0.0.1:8000",
    "127.8.9.1",
    "[::1]:1",
    "[::1]",
]
OTHERS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "evil.example#localhost",
    "evil@localhost",
    "10.0.0.1",
    "[::2]:80",
    "localhost:80:80",
    "localhost/",
    "",
]


def ask(name, origin=None, keys=None, **settings):
    headers = {"host": name} | ({} if origin is None else {"origin": origin}) | {"x-api-key": "some-key-1"}
    app = make_app(FakeEngine(), keys=keys, **settings)
    return asyncio.run(call(app, "/ask", {"text": "x"}, headers=headers))


class TestWithoutKeys:
    @pytest.mark.parametrize("host", OURS)
    def test_names_of_this_machine(self, host):
        assert ask(host).status == 200
        assert ask(host, "http://" + host.lower()).status == 200

    @pytest.mark.parametrize("host", OTHERS)
    def test_no_other_name(self, host):
        answer = ask(host)
        assert (answer.status, answer.json()["error"]["code"]) == (421, "unknown_host")
        assert "allowed_hosts" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", ""])
    def test_no_page_of_another_site(self, origin):
        answer = ask("localhost", origin)
        assert (answer.status, answer.json()["error"]["code"]) == (403, "unknown_origin")

    def test_each_of_several_values_counts(self):
        guard = HostGuard(ServeSettings(), has_keys=False)
        with pytest.raises(Exception, match="'host'"):
            guard.check(Headers([(b"host", b"localhost"), (b"host", b"evil.example")]))
        guard.check(Headers([]))

    def test_public_routes_and_the_page_are_guarded_like_the_rest(self):
        async def look():
            async with running() as server:
                for path in ("/", "/openapi.json", "/metrics", "/version", "/things/x"):
                    request = f"GET {path} HTTP/1.1\r\nhost: evil.example\r\n\r\n".encode()
                    assert (await exchange(server, request))[0] == 421, path

        asyncio.run(look())

    @pytest.mark.parametrize(("path", "method"), [("/nothing", "GET"), ("/ask", "GET"), ("/livez", "POST")])
    def test_they_are_not_told_what_there_is_not_either(self, path, method):
        answer = asyncio.run(call(make_app(FakeEngine()), path, method=method, headers={"host": "evil.example"}))
        assert (answer.status, "allow" in answer.headers) == (421, False)

    def test_nothing_of_a_refused_request_is_read(self):
        api = AskApi()
        parts = [b"x"] * 3
        answer = asyncio.run(call(make_app(FakeEngine(), api), "/ask", parts=parts, headers={"host": "evil.example"}))
        assert (answer.status, len(parts), api.requests) == (421, 3, [])


class TestSettings:
    @pytest.mark.parametrize(
        "host", ["llm.example.org", "LLM.example.org:443", "192.0.2.7:8000", "[2001:db8::1]", "localhost"]
    )
    def test_names_that_are_listed(self, host):
        listed = "llm.example.org, 192.0.2.7,2001:db8::1"
        assert ask(host, allowed_hosts=listed).status == 200
        assert ask("evil.example", allowed_hosts=listed).status == 421
        assert ask("localhost", "https://llm.example.org", allowed_hosts=listed).status == 200

    def test_any(self):
        assert ask("evil.example", "null", allowed_hosts="*").status == 200

    def test_the_address_that_it_listens_on(self):
        assert ask("192.0.2.7:8000", host="192.0.2.7", allowed_hosts="llm.example.org").status == 200

    @pytest.mark.parametrize(
        ("keys", "settings"), [(KEYS, {}), (None, {"uds": "/run/s"}), (None, {"host": "0.0.0.0", "insecure": True})]
    )
    def test_where_no_page_could_ask_every_name_is_answered(self, keys, settings):
        assert ask("evil.example", "https://evil.example", keys, **settings).status == 200

    @pytest.mark.parametrize(("keys", "settings"), [(KEYS, {}), (None, {"uds": "/run/s"})])
    def test_a_list_holds_everywhere(self, keys, settings):
        assert ask("evil.example", keys=keys, allowed_hosts="llm.example.org", **settings).status == 421

    @pytest.mark.parametrize("keys", [KEYS, None])
    def test_probes_ask_for_an_address_that_no_list_knows_and_nobody_else_may(self, keys):
        app = make_app(FakeEngine(), keys=keys, allowed_hosts="llm.example.org")
        expected = {"/livez": 200, "/readyz": 200, "/health": 200, "/version": 421, "/load": 421}
        headers = {"host": "10.1.2.3:8000", "x-api-key": "some-key-1"}
        assert {path: asyncio.run(call(app, path, headers=headers)).status for path in expected} == expected

    @pytest.mark.parametrize("listed", ["a,,b", ",", "https://a", "a:80", "[::1]", "a b", "*.example.org"])
    def test_what_is_no_name_is_refused_at_the_start(self, listed):
        with pytest.raises(ConfigError, match="without scheme and port"):
            ServeSettings(allowed_hosts=listed)
