"""Lines of a file of requests: what is one, what is none, and how lines are told apart."""

import io
import json

import pytest

from zif.serving.batch.requests import SPARE_LINE_BYTES, parse_request, read_requests

LIMIT = 1000


def line(**changes):
    return json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {"n": 1}} | changes).encode()


def read(*lines):
    return list(read_requests(io.BytesIO(b"\n".join(lines)), LIMIT))


def test_a_request_keeps_its_body_as_it_was_sent():
    content = b'{"custom_id":"\xc3\xa9","method":"POST","url":"/v1/x","body": {"a" :[1.50,"\\u00e9"]}}'
    request = parse_request(content, 7)
    assert (request.custom_id, request.url, request.fault) == ("é", "/v1/x", None)
    assert request.body == b'{"a" :[1.50,"\\u00e9"]}'


@pytest.mark.parametrize(
    ("content", "code", "custom_id"),
    [
        (b'{"custom_id": "a"', "invalid_json", None),
        (b'{"custom_id": "\xff", "method": "POST", "url": "/", "body": {}}', "invalid_json", None),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000, "invalid_json", None),
        (b"[]", "invalid_request", None),
        (line(custom_id=3), "invalid_request", None),
        (line(custom_id=""), "invalid_request", None),
        (line(custom_id="a" * 513), "invalid_request", None),
        (line(method="GET"), "invalid_request", "a"),
        (line(url=None), "invalid_request", "a"),
        (line(priority=1), "invalid_request", "a"),
        (b'{"custom_id": "a", "method": "POST", "url": "/v1/x"}', "invalid_request", "a"),
        (line(body={"stream": True}), "stream_not_supported", "a"),
    ],
)
def test_a_line_that_is_no_request_says_so(content, code, custom_id):
    request = parse_request(content, 4)
    assert (request.fault.code, request.custom_id, request.fault.line) == (code, custom_id, 4)


def test_a_faulty_line_that_has_moved_is_the_same_request_where_it_has_a_name():
    named, nameless = line(method="GET"), b"[]"
    assert parse_request(named, 4).digest == parse_request(named, 5).digest
    assert parse_request(named, 4).digest != parse_request(line(method="PUT"), 4).digest
    assert parse_request(nameless, 4).digest != parse_request(nameless, 5).digest


def test_a_long_line_is_passed_over_and_the_next_ones_are_read():
    long = line(custom_id="long", body={"text": "x" * 3 * (LIMIT + SPARE_LINE_BYTES)})
    found = read(line(custom_id="a"), long, b"", b"  \r", line(custom_id="b") + b"\r", long[:-1])
    assert [(r.line, r.custom_id, r.fault and r.fault.code) for r in found] == [
        (1, "a", None),
        (2, None, "line_too_long"),
        (5, "b", None),
        (6, None, "line_too_long"),
    ]
    assert len({r.key for r in found}) == 4


def test_a_line_as_long_as_allowed_is_a_request_with_or_without_an_end():
    exact = line(body={"text": ""})
    exact = line(body={"text": "x" * (LIMIT + SPARE_LINE_BYTES - len(exact))})
    for end in (b"", b"\n"):
        (request,) = read_requests(io.BytesIO(exact + end), LIMIT)
        assert (len(exact), request.fault) == (LIMIT + SPARE_LINE_BYTES, None)


def test_a_mark_of_the_byte_order_is_no_fault():
    assert read(b"\xef\xbb\xbf" + line())[0].fault is None


def test_keys_are_of_ids_and_digests_of_contents():
    first, same, other, renamed = (
        parse_request(line(**changes), number)
        for number, changes in enumerate([{}, {}, {"body": {"n": 2}}, {"custom_id": "b"}])
    )
    assert (first.key, first.digest) == (same.key, same.digest)
    assert first.key == other.key
    assert first.digest != other.digest
    assert first.key != renamed.key
