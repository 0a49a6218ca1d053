"""The access log: one line for each request, and never content."""

import json
import logging

import pytest

from zif.serving.http.exchange import RequestRecord
from zif.serving.telemetry.access_log import AccessLog, JsonLines, access_fields


def record(**fields: object) -> RequestRecord:
    given = {"route": "/v1/chat/completions", "method": "POST", "status": 200, "started_s": 100.0, "ended_s": 101.5}
    return RequestRecord("id-1", **{**given, **fields})  # type: ignore[arg-type]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "zif.access")
    return lambda: [json.loads(JsonLines().format(entry)) for entry in caplog.records]


def test_a_line_says_what_happened(lines) -> None:
    AccessLog()(
        record(
            model="tiny", finish_reasons=["stop"], num_prompt_tokens=9, num_cached_tokens=4, num_output_tokens=3,
            queue_s=0.002, first_token_s=100.25, client_request_id="abc", streamed=True,
        )
    )  # fmt: skip
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info", "logger": "zif.access", "message": "request", "id": "id-1", "client_id": "abc",
        "method": "POST", "route": "/v1/chat/completions", "status": 200, "model": "tiny", "finish_reason": "stop",
        "samples": 1, "streamed": True, "failure": None, "prompt_tokens": 9, "cached_tokens": 4, "output_tokens": 3,
        "queue_ms": 2.0, "ttft_ms": 250.0, "e2e_ms": 1500.0,
    }  # fmt: skip


def test_an_aborted_request_has_its_line(lines) -> None:
    AccessLog()(record(aborted=True, finish_reasons=[], num_output_tokens=2, status=0))
    assert [(line["finish_reason"], line["output_tokens"]) for line in lines()] == [("abort", 2)]


def test_a_failed_request_says_why(lines) -> None:
    AccessLog()(record(failure="overloaded", status=429))
    assert [(line["finish_reason"], line["failure"], line["status"]) for line in lines()] == [
        ("error", "overloaded", 429)
    ]


def test_probes_are_silent_until_they_fail(lines) -> None:
    log = AccessLog()
    log(record(route="/readyz"))
    log(record(route="/readyz", status=503))
    assert [line["status"] for line in lines()] == [503]


def test_nothing_ends_a_line_early() -> None:
    entry = logging.LogRecord("zif", logging.INFO, "", 0, "two\nlines \u2028 %s", ("\x1b[31m",), None)
    entry.fields = access_fields(record(model='x"\n' * 300))
    text = JsonLines().format(entry)
    assert text.isascii()
    assert "\n" not in text
    assert len(json.loads(text)["model"]) == 256


def test_exceptions_are_in_the_object() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        entry = logging.LogRecord("zif", logging.ERROR, "", 0, "failed", (), (ValueError, error, error.__traceback__))
    line = json.loads(JsonLines().format(entry))
    assert line["level"] == "error"
    assert "ValueError: broken" in line["exception"]
