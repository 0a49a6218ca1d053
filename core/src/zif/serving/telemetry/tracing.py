"""A span for each request, by the OpenTelemetry API, when that is installed and somebody has set it up.

Only the API is used: which exporter gets the spans is the operator's choice (`opentelemetry-instrument zif serve ...`).
Spans are written when their request has ended, from the same record as its log line, so nothing happens meanwhile. The
parent is the caller's `traceparent` (W3C Trace Context). What was asked and answered is not recorded.

Source of the names: open-telemetry/semantic-conventions-genai, which is in development; `CONVENTIONS` pins ours.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from zif.serving.http.exchange import RequestRecord
from zif.serving.telemetry.access_log import finish_reason

CONVENTIONS: Final = "semantic-conventions-genai, spans of model servers, 2026-11"

OPERATIONS: Final[Mapping[str, str]] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by route; other routes have no span."""

ATTRIBUTES: Final[Mapping[str, Callable[[RequestRecord], Any]]] = {
    "gen_ai.operation.name": lambda record: OPERATIONS[record.route],
    "gen_ai.provider.name": lambda record: "zif",
    "gen_ai.request.model": lambda record: record.model,
    "gen_ai.response.model": lambda record: record.model,
    "gen_ai.response.id": lambda record: record.request_id,
    "gen_ai.request.max_tokens": lambda record: record.max_tokens,
    "gen_ai.request.choice.count": lambda record: record.num_samples if record.num_samples != 1 else None,
    "gen_ai.response.finish_reasons": lambda record: tuple(record.finish_reasons) or None,
    "gen_ai.usage.input_tokens": lambda record: record.num_prompt_tokens or None,
    "gen_ai.usage.output_tokens": lambda record: record.num_output_tokens or None,
    "gen_ai.usage.cache_read.input_tokens": lambda record: record.num_cached_tokens or None,
    "http.request.method": lambda record: record.method,
    "http.route": lambda record: record.route,
    "http.response.status_code": lambda record: record.status or None,
    "error.type": lambda record: _error_type(record),
    "zif.request.queue_seconds": lambda record: record.queue_s,
    "zif.request.streamed": lambda record: record.streamed,
}
"""Every attribute, and where it comes from; None leaves it out."""

FIRST_TOKEN_EVENT: Final = "gen_ai.first_token"
_NS: Final = 10**9


class SpanWriter:
    """Writes a span for every record that it is called with. `now_s` and `now_ns` tie the two clocks together."""

    def __init__(
        self,
        tracer: Any,
        now_s: Callable[[], float] = time.monotonic,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._tracer = tracer
        self._now_s = now_s
        self._now_ns = now_ns

    def __call__(self, record: RequestRecord) -> None:
        """Write the span of a request that has ended, if its route has one."""
        operation = OPERATIONS.get(record.route)
        if operation is None:
            return
        offset_ns = self._now_ns() - int(self._now_s() * _NS)
        carrier = {} if record.traceparent is None else {"traceparent": record.traceparent}
        span = self._tracer.start_span(
            f"{operation} {record.model}" if record.model else operation,
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            start_time=_nanoseconds(record.started_s, offset_ns),
        )
        if span.is_recording():
            self._describe(span, record, offset_ns)
        ended_s = self._now_s() if record.ended_s is None else record.ended_s
        span.end(end_time=_nanoseconds(ended_s, offset_ns))

    def _describe(self, span: Any, record: RequestRecord, offset_ns: int) -> None:
        for name, value_of in ATTRIBUTES.items():
            value = value_of(record)
            if value is not None:
                span.set_attribute(name, value)
        if record.first_token_s is not None:
            span.add_event(FIRST_TOKEN_EVENT, timestamp=_nanoseconds(record.first_token_s, offset_ns))
        if (failure := _error_type(record)) is not None:
            span.set_status(self._trace.StatusCode.ERROR, failure)


def open_span_writer() -> SpanWriter | None:
    """Return a writer over the tracer that was set up, None when OpenTelemetry is not installed."""
    if importlib.util.find_spec("opentelemetry") is None:
        return None
    from opentelemetry import trace

    return SpanWriter(trace.get_tracer("zif"))


def _error_type(record: RequestRecord) -> str | None:
    """Return why a request failed. Leaving is the client's right, and its reason is told apart."""
    if record.failure is not None:
        return record.failure
    return "client_left" if finish_reason(record) == "abort" else None


def _nanoseconds(moment_s: float, offset_ns: int) -> int:
    return int(moment_s * _NS) + offset_ns
