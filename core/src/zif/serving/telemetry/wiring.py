"""All telemetry of one server, put together: the engine to serve with, the observers of requests, the routes.

telemetry = Telemetry(engine, with_aliases=settings.vllm_metrics, log_requests=settings.log_requests)
app = build_app(telemetry.engine, settings, [*telemetry.routes(), ...], keys, telemetry.observers())
"""

from collections.abc import Callable

from zif.serving.answers import EngineClient
from zif.serving.http.exchange import AuthScope, Request, RequestRecord, Response
from zif.serving.http.registry import Route, ServerContext
from zif.serving.telemetry.access_log import AccessLog
from zif.serving.telemetry.metered import MeteredEngine
from zif.serving.telemetry.metrics import CONTENT_TYPE, ServerMetrics
from zif.serving.telemetry.phases import PhaseTimes
from zif.serving.telemetry.tracing import open_span_writer

METRICS_ROUTE = "/metrics"
_UNMATCHED = "none"


class Telemetry:
    """Metrics, access log and traces over one engine."""

    def __init__(
        self,
        engine: EngineClient,
        *,
        with_aliases: bool = True,
        log_requests: bool = True,
        phases: PhaseTimes | None = None,
    ) -> None:
        times = phases or PhaseTimes(lambda phase, done, total: None)
        self.metrics = ServerMetrics(engine, with_aliases=with_aliases, phases=times.seconds)
        self.engine: EngineClient = MeteredEngine(engine, self.metrics)
        self._log = AccessLog() if log_requests else None
        self._spans = open_span_writer()

    def observers(self) -> list[Callable[[RequestRecord], None]]:
        """Return what is to hear of every request that has ended."""
        given = [self._count, self._log, self._spans]
        return [observer for observer in given if observer is not None]

    def routes(self) -> list[Route]:
        """Return the route of the metrics."""
        return [
            Route(
                METRICS_ROUTE,
                "GET",
                AuthScope.METRICS,
                self._answer,
                summary="Metrics, as Prometheus reads them",
                content_type=CONTENT_TYPE,
            )
        ]

    async def _answer(self, request: Request[None], context: ServerContext) -> Response:
        return Response(self.metrics.render(), content_type=CONTENT_TYPE)

    def _count(self, record: RequestRecord) -> None:
        self.metrics.http_requests.add(record.route or _UNMATCHED, _method(record.method), str(record.status))


def _method(name: str) -> str:
    """Return the method as a label: a client may send any word as one."""
    return name if name in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH") else "other"
