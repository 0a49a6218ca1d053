"""One line for each request that has ended, also when the client left. Never what was asked or answered.

Lines go to the logger "zif.access" as their fields; `JsonLines` writes them, and everything else that is logged, as
JSON, one object a line.
"""

import json
import logging
import time
from typing import Any, Final

from zif.serving.http.exchange import RequestRecord

ACCESS_LOGGER: Final = "zif.access"
_POLLED: Final = frozenset({"/livez", "/readyz", "/health", "/metrics", "/load"})
_MAX_TEXT: Final = 256
"""Characters of a field. Ids and names are ours or checked; nothing else gets into a line."""


class AccessLog:
    """Writes a line for every record that it is called with. `quiet_routes` are those that are asked all the time."""

    def __init__(self, quiet_routes: frozenset[str] = _POLLED) -> None:
        self._logger = logging.getLogger(ACCESS_LOGGER)
        self._quiet_routes = quiet_routes

    def __call__(self, record: RequestRecord) -> None:
        """Write the line of a request that has ended. Probes that were answered well are not worth one."""
        if record.route in self._quiet_routes and record.status == 200:
            return
        if self._logger.isEnabledFor(logging.INFO):
            # Made by hand: looking for the caller's line in the source takes longer than the rest.
            entry = logging.LogRecord(ACCESS_LOGGER, logging.INFO, "", 0, "request", (), None)
            entry.fields = access_fields(record)
            self._logger.handle(entry)


def access_fields(record: RequestRecord) -> dict[str, Any]:
    """Return what the line says: None and "" where something did not happen. Times are milliseconds."""
    reasons = record.finish_reasons
    return {
        "id": record.request_id,
        "client_id": record.client_request_id,
        "method": record.method,
        "route": record.route or "none",
        "status": record.status,
        "model": None if record.model is None else record.model[:_MAX_TEXT],
        "finish_reason": finish_reason(record),
        "samples": len(reasons),
        "streamed": record.streamed,
        "failure": record.failure,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "queue_ms": _milliseconds(record.queue_s),
        "ttft_ms": _milliseconds(_since_start(record, record.first_token_s)),
        "e2e_ms": _milliseconds(_since_start(record, record.ended_s)),
    }


def finish_reason(record: RequestRecord) -> str | None:
    """Return why a request ended: "abort" when the client left, else what its last sample ended with."""
    if record.aborted:
        return "abort"
    if record.failure is not None:
        return "error"
    return record.finish_reasons[-1] if record.finish_reasons else None


class JsonLines(logging.Formatter):
    """Formats records as one JSON object a line: time (UTC), level, logger, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. No character of any field can end it early."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _since_start(record: RequestRecord, moment_s: float | None) -> float | None:
    return None if moment_s is None else moment_s - record.started_s


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
