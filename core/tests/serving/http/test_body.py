"""Bodies: what is too long, too deep, too slow, no JSON, no UTF-8, or of a wrong shape; each names what is wrong."""

import asyncio
import contextlib
import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fakes import FakeEngine, Script
from serving.http.apis import make_app
from serving.http.calls import Call, call
from zif.errors import ConfigError
from zif.serving.http.json_scan import JsonLimitError, JsonScan
from zif.serving.http.settings import ServeSettings


def post(body, path="/ask", **options):
    limits = {name: options.pop(name) for name in list(options) if name.startswith("max_")}
    return asyncio.run(call(make_app(FakeEngine(), **limits), path, body, **options))


def error_of(answer):
    return answer.json()["error"]


def scan(body, max_depth=64, max_values=2**18):
    found = JsonScan(body, max_depth, max_values)
    for _ in found.slices():
        pass
    return found


class TestShape:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "text"),
            ({"text": 1}, "text"),
            ({"text": None}, "text"),
            ({"text": "x" * 1001}, "text"),
            ({"text": "x", "n": 0}, "n"),
            ({"text": "x", "n": 9}, "n"),
            ({"text": "x", "n": 1.5}, "n"),
            ({"text": "x", "n": 10**300}, "n"),
            ({"text": "x", "parts": [{"a": 1}, {"b": "no"}]}, "parts[1][...]"),
            ([], None),
            ("text", None),
        ],
    )
    def test_a_wrong_value_names_its_field(self, body, param):
        answer = post(json.dumps(body).encode())
        assert (answer.status, error_of(answer)["param"]) == (400, param)
        assert len(error_of(answer)["message"]) < 400

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b'{"text"', b'{"text":"x"', b'{"text":"x"}}', b'{"text":NaN}', b"\x00", b'{"text":"\\ud800"}'],
    )
    def test_no_json(self, body):
        answer = post(body)
        assert (answer.status, error_of(answer)["code"] in ("invalid_json", "invalid_value")) == (400, True)

    @pytest.mark.parametrize(
        "body", [b'{"text":"\xff"}', b'{"unknown":"\xc3"}', b'{"\xff":1,"text":"x"}', b'{"text":"\xc3']
    )
    def test_no_utf8_also_where_nobody_looks(self, body):
        answer = post(body)
        assert (answer.status, error_of(answer)["code"]) == (400, "invalid_utf8")

    @pytest.mark.parametrize(
        ("content_type", "status"),
        [
            ("application/json", 200),
            ("Application/JSON; charset=utf-8", 200),
            ("text/plain", 415),
            ("application/x-www-form-urlencoded", 415),
            ("", 415),
        ],
    )
    def test_only_json_is_taken(self, content_type, status):
        assert post({"text": "x"}, headers={"content-type": content_type}).status == status

    def test_no_compression(self):
        assert post({"text": "x"}, headers={"content-encoding": "gzip"}).status == 415


class TestLimits:
    @pytest.mark.parametrize("length", ["-1", "1e3", "", "x", "9" * 30, "\xb2"])
    def test_a_length_that_is_none(self, length):
        assert post({"text": "x"}, headers={"content-length": length}).status == 400

    def test_a_length_over_the_limit_is_refused_before_reading(self):
        never = asyncio.Event()
        answer = post(None, method="POST", headers={"content-type": "application/json", "content-length": "4096"},
                      parts=[never], max_body_bytes=1024)  # fmt: skip
        assert (answer.status, error_of(answer)["code"]) == (413, "body_too_large")

    def test_a_body_that_does_not_say_its_length_is_cut_at_the_limit(self):
        parts = [b'{"text":"'] + [b"x" * 100] * 50
        answer = post(None, headers={"content-type": "application/json"}, parts=parts, max_body_bytes=1024)
        assert answer.status == 413
        assert len(parts) == 51

    def test_a_route_may_have_a_lower_limit(self):
        assert post({"text": "x" * 100}, "/small").status == 413
        assert post({"text": "x"}, "/small").status == 200

    def test_a_slow_body_ends(self):
        async def trickle():
            app = make_app(FakeEngine())
            object.__setattr__(app.context.settings, "body_timeout_s", 0.02)
            return await call(
                app, "/ask", None, method="POST", headers={"content-type": "application/json"},
                parts=[b"{", asyncio.Event(), b"}"],
            )  # fmt: skip

        answer = asyncio.run(trickle())
        assert (answer.status, answer.headers["connection"], answer.headers["x-should-retry"]) == (408, "close", "true")

    def test_a_client_that_leaves_within_its_body_gets_nothing(self):
        async def leave():
            records = []
            request = Call("/ask", parts=[b"{"], headers={"content-type": "application/json"})
            original = request.receive

            async def receive():
                return (await original()) | {"more_body": True}

            request.leave()
            await make_app(FakeEngine(), observers=[records.append])(request.scope, receive, request.send)
            assert request.answer.status == 0
            assert records[0].aborted

        asyncio.run(leave())

    @pytest.mark.parametrize(("depth", "status"), [(8, 200), (9, 400), (100_000, 400)])
    def test_depth(self, depth, status):
        nested = b"[" * (depth - 1) + b"]" * (depth - 1)
        answer = post(b'{"text":"x","unknown":' + nested + b"}", max_json_depth=8)
        assert answer.status == status

    @pytest.mark.parametrize(("num_values", "status"), [(90, 200), (200, 400)])
    def test_number_of_values(self, num_values, status):
        body = {"text": "x", "unknown": list(range(num_values))}
        assert post(body, max_json_values=100).status == status

    @pytest.mark.parametrize(
        "body",
        [
            b'{"text":"x","text":"y"}',
            b'{"text":"x", "t\\u0065xt" :"y"}',
            b'{"text":"x","parts":[{"a":1,"b":2,"a":1}]}',
            b'{"text":"x","unknown":{"k":{},"k":[]}}',
        ],
    )
    def test_a_key_given_twice(self, body):
        answer = post(body)
        assert answer.status == 400
        assert "twice" in error_of(answer)["message"]

    def test_the_same_key_in_different_objects(self):
        assert post(b'{"text":"text","n":1,"parts":[{"n":1},{"n":1}]}').status == 200


FEW_BYTES = {"max_body_bytes": 1024, "max_body_bytes_in_flight": 1500}
JSON_HEADERS = {"content-type": "application/json"}


class TestAllBodiesTogether:
    def test_they_are_bounded_and_the_rest_is_told_when_to_come_again(self):
        async def fill():
            app = make_app(FakeEngine(), **FEW_BYTES)
            rest = asyncio.Event()
            slow = Call("/ask", parts=[b'{"text":"' + b"x" * 900, rest, b'"}'], headers=JSON_HEADERS)
            task = asyncio.create_task(app(slow.scope, slow.receive, slow.send))
            await asyncio.sleep(0)
            refused = await call(app, "/ask", {"text": "x" * 700})
            small = await call(app, "/ask", {"text": "x" * 100})
            rest.set()
            await task
            again = await call(app, "/ask", {"text": "x" * 700})
            assert (refused.status, error_of(refused)["code"]) == (503, "too_many_body_bytes")
            assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
            assert [small.status, slow.answer.status, again.status] == [200, 200, 200]

        asyncio.run(fill())

    def test_they_count_until_their_requests_have_ended(self):
        async def stream():
            gate = asyncio.Event()
            app = make_app(FakeEngine(Script(gates=[gate])), **FEW_BYTES)
            request = Call("/stream", {"text": "x" * 900})
            task = asyncio.create_task(app(request.scope, request.receive, request.send))
            await asyncio.sleep(0)
            assert (await call(app, "/ask", {"text": "x" * 700})).status == 503
            gate.set()
            await task
            assert (await call(app, "/ask", {"text": "x" * 700})).status == 200

        asyncio.run(stream())

    @pytest.mark.parametrize("body", [b"{", b"\xff" * 900, b"x" * 2000, b'{"text":"' + b"x" * 900 + b'"}'])
    def test_whatever_becomes_of_them_nothing_stays_counted(self, body):
        async def repeat():
            app = make_app(FakeEngine(), **FEW_BYTES)
            first = await call(app, "/ask", body, headers=JSON_HEADERS)
            for _ in range(5):
                assert (await call(app, "/ask", body, headers=JSON_HEADERS)).status == first.status != 503

        asyncio.run(repeat())

    def test_one_that_fits_alone_must_fit_all(self):
        with pytest.raises(ConfigError, match="max_body_bytes_in_flight=2048"):
            ServeSettings(max_body_bytes=4096, max_body_bytes_in_flight=2048)


class TestScan:
    def test_strings_hide_what_looks_like_structure(self):
        body = json.dumps({"a": '[[[{"x": "\\" ], \\\\', "b": ["\\", '"'], '"c"': {}}).encode()
        assert scan(body, max_depth=2).top_level_keys == {b"a", b"b", b'"c"'}

    @pytest.mark.parametrize("fill", [b"x", b'\\"', b"\\\\", b"\\u0041", b"[", b","])
    def test_a_long_string_is_one_value_and_scanned_in_slices(self, fill):
        body = b'{"a":"' + fill * 200_000 + b'","b":1}'
        found = JsonScan(body, 2, 10)
        num_slices = sum(1 for _ in found.slices())
        assert found.top_level_keys == {b"a", b"b"}
        assert num_slices >= len(body) // 2**16

    @pytest.mark.parametrize("body", [b'"' + b"\\" * 70_001, b'{"a', b"]", b"}{", b'{"a":"\\', b"," * 100, b"\\"])
    def test_what_is_no_json_ends_the_scan(self, body):
        scan(body)

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )

    @settings(max_examples=200, deadline=None)
    @given(json_values, st.booleans())
    def test_it_agrees_with_a_decoder(self, value, ascii_only):
        body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        depth, count = _depth(value), _count(value)
        found = scan(body, max(depth, 1), max(count, 1))
        keys = {key.encode("utf-8", "surrogatepass") for key in value} if isinstance(value, dict) else set()
        if all(_is_text(key) for key in keys):
            assert found.top_level_keys == keys
        if depth > 1:
            with pytest.raises(JsonLimitError, match="deeper"):
                scan(body, depth - 1)
        if count > 1:
            with pytest.raises(JsonLimitError, match="more than"):
                scan(body, max(depth, 1), count - 1)

    @settings(max_examples=300, deadline=None)
    @given(st.binary(max_size=200) | st.text(alphabet='[]{},:"\\ a1', max_size=60).map(str.encode))
    def test_any_bytes_are_refused_or_accepted_as_the_decoder_does(self, body):
        with contextlib.suppress(JsonLimitError):  # a key given twice
            scan(body)
        try:
            value = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if msgspec.json.encode(value).count(b":") == body.count(b":"):  # no key was given twice
            scan(body, max(_depth(value), 1), max(_count(value), 1))


def _depth(value):
    if isinstance(value, dict | list):
        return 1 + max((_depth(v) for v in (value.values() if isinstance(value, dict) else value)), default=0)
    return 0


def _count(value):
    """Count brackets, commas and keys, which is what is bounded."""
    if isinstance(value, dict):
        return 1 + len(value) + max(len(value) - 1, 0) + sum(map(_count, value.values()))
    if isinstance(value, list):
        return 1 + max(len(value) - 1, 0) + sum(map(_count, value))
    return 0


def _is_text(key):
    try:
        key.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
