"""Spans by the OpenTelemetry API, into a tracer that keeps what it is told."""

import sys

import pytest
from opentelemetry import trace

from zif.serving.http.exchange import RequestRecord
from zif.serving.telemetry import tracing
from zif.serving.telemetry.tracing import SpanWriter, open_span_writer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class KeptSpan(trace.NonRecordingSpan):
    def __init__(self, name: str, **given: object) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)
        self.name, self.given = name, given
        self.attributes: dict[str, object] = {}
        self.events: list[tuple[str, int]] = []
        self.status = self.ended_ns = None

    def is_recording(self) -> bool:
        return True

    def set_attribute(self, key, value):
        self.attributes[key] = value

    def add_event(self, name, attributes=None, timestamp=None):
        self.events.append((name, timestamp))

    def set_status(self, status, description=None):
        self.status = (status, description)

    def end(self, end_time=None):
        self.ended_ns = end_time


class KeepingTracer:
    def __init__(self) -> None:
        self.spans: list[KeptSpan] = []

    def start_span(self, name, **given):
        self.spans.append(KeptSpan(name, **given))
        return self.spans[-1]


def written(**fields: object) -> list[KeptSpan]:
    tracer = KeepingTracer()
    given = {"route": "/v1/chat/completions", "method": "POST", "status": 200, "started_s": 1.0, "ended_s": 3.0}
    SpanWriter(tracer, lambda: 4.0, lambda: 10_000_000_000)(RequestRecord("id-1", **{**given, **fields}))
    return tracer.spans


def test_a_span_has_times_names_and_counts() -> None:
    (span,) = written(
        model="tiny", finish_reasons=["stop"], num_prompt_tokens=9, num_output_tokens=3, first_token_s=2.0, max_tokens=8
    )
    assert span.name == "chat tiny"
    assert span.given["kind"] is trace.SpanKind.SERVER
    assert (span.given["start_time"], span.ended_ns) == (7_000_000_000, 9_000_000_000)
    assert span.events == [("gen_ai.first_token", 8_000_000_000)]
    assert span.status is None
    assert span.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "zif", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny", "gen_ai.response.id": "id-1", "gen_ai.request.max_tokens": 8,
        "gen_ai.response.finish_reasons": ("stop",), "gen_ai.usage.input_tokens": 9, "gen_ai.usage.output_tokens": 3,
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "http.response.status_code": 200,
        "zif.request.streamed": False,
    }  # fmt: skip


def test_the_callers_span_is_the_parent() -> None:
    (span,) = written(traceparent=PARENT)
    parent = trace.get_current_span(span.given["context"]).get_span_context()
    assert f"{parent.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize("header", [None, "", "junk", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 10_000])
def test_what_is_no_parent_is_none(header: str | None) -> None:
    (span,) = written(traceparent=header)
    assert not trace.get_current_span(span.given["context"]).get_span_context().is_valid


def test_failures_and_leavers_are_told_apart() -> None:
    assert written(failure="overloaded")[0].status == (trace.StatusCode.ERROR, "overloaded")
    assert written(aborted=True)[0].attributes["error.type"] == "client_left"


def test_routes_without_a_model_have_no_span() -> None:
    assert written(route="/metrics") == []
    assert written(route="") == []


def test_every_operation_names_a_span() -> None:
    for route, operation in tracing.OPERATIONS.items():
        assert written(route=route)[0].name == operation


def test_without_the_library_there_is_no_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_span_writer() is not None
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda name: None)
    assert open_span_writer() is None


def test_without_a_set_up_tracer_spans_go_nowhere() -> None:
    writer = open_span_writer()
    assert writer is not None
    writer(RequestRecord("id-1", route="/v1/completions", traceparent=PARENT))
