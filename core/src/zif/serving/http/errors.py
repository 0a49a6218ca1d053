"""What goes wrong with an HTTP request, as values, and how it is written to the caller.

Handlers raise `ApiError`, or let the errors of the engine through: `RequestError` (400), `OverloadedError` (429),
`EngineUnavailableError` (503). Anything else is a fault of ours: 500 with an id, and one line in the log.
No text that is written here holds an address, a path or the repr of an object.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from zif.errors import RequestError
from zif.serving.answers import EngineUnavailableError, OverloadedError

_DEFAULT_RETRY_AFTER_S = 1.0
_UNAVAILABLE = "the engine takes no requests now; try again later"


class FailureKind(StrEnum):
    """Why a request was not answered, whatever the API. `STATUS_OF` gives the usual status of each."""

    INVALID = "invalid"
    AUTHENTICATION = "authentication"
    PERMISSION = "permission"
    NOT_FOUND = "not_found"
    METHOD = "method"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    MEDIA_TYPE = "media_type"
    MISDIRECTED = "misdirected"
    HEADERS_TOO_LARGE = "headers_too_large"
    OVERLOADED = "overloaded"
    INTERNAL = "internal"
    NOT_IMPLEMENTED = "not_implemented"
    UNAVAILABLE = "unavailable"


STATUS_OF = {
    FailureKind.INVALID: 400,
    FailureKind.AUTHENTICATION: 401,
    FailureKind.PERMISSION: 403,
    FailureKind.NOT_FOUND: 404,
    FailureKind.METHOD: 405,
    FailureKind.TIMEOUT: 408,
    FailureKind.TOO_LARGE: 413,
    FailureKind.MEDIA_TYPE: 415,
    FailureKind.MISDIRECTED: 421,
    FailureKind.HEADERS_TOO_LARGE: 431,
    FailureKind.OVERLOADED: 429,
    FailureKind.INTERNAL: 500,
    FailureKind.NOT_IMPLEMENTED: 501,
    FailureKind.UNAVAILABLE: 503,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What the caller is told: `param` names the field at fault, `code` is a word for programs.

    `retry_after_s` comes with OVERLOADED and UNAVAILABLE: seconds until another try makes sense.
    """

    kind: FailureKind
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


class ApiError(Exception):
    """A request that is answered with a failure. Raised by handlers, before or while they stream.

    raise ApiError(FailureKind.INVALID, "'best_of' is not supported; leave it out", param="best_of")
    """

    def __init__(
        self, kind: FailureKind, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.failure = Failure(kind, message, param, code, retry_after_s)


class ErrorStyle(Protocol):
    """How the failures of a route are written. One per API; a route names its own."""

    @property
    def answer_type(self) -> Any:
        """Return the type of what `body` holds."""
        ...

    def status(self, failure: Failure) -> int:
        """Return the HTTP status."""
        ...

    def body(self, failure: Failure) -> bytes:
        """Return the JSON of the body."""
        ...

    def frame(self, failure: Failure) -> bytes:
        """Return what ends a stream that was under way: one or more whole server-sent events."""
        ...


_OPENAI_TYPES = {
    FailureKind.AUTHENTICATION: "authentication_error",
    FailureKind.PERMISSION: "permission_error",
    FailureKind.NOT_FOUND: "not_found_error",
    FailureKind.OVERLOADED: "rate_limit_error",
    FailureKind.INTERNAL: "server_error",
    FailureKind.UNAVAILABLE: "server_error",
    FailureKind.NOT_IMPLEMENTED: "not_implemented_error",
}


class OpenAIError(msgspec.Struct, frozen=True):
    """What went wrong. `code` is a word for programs, `param` the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorAnswer(msgspec.Struct, frozen=True):
    """What a request that failed is answered with."""

    error: OpenAIError


class OpenAIErrors:
    """Errors as `{"error": {"message", "type", "param", "code"}}`.

    Source: the errors of OpenAI's API reference.
    """

    answer_type: Any = OpenAIErrorAnswer

    def status(self, failure: Failure) -> int:
        """Return the usual status of the kind."""
        return STATUS_OF[failure.kind]

    def body(self, failure: Failure) -> bytes:
        """Return the error object. `code` is the kind where nothing finer is known."""
        kind = _OPENAI_TYPES.get(failure.kind, "invalid_request_error")
        error = OpenAIError(failure.message, kind, failure.param, failure.code or failure.kind.value)
        return msgspec.json.encode(OpenAIErrorAnswer(error))

    def frame(self, failure: Failure) -> bytes:
        """Return the error as an event, and the end of the stream after it."""
        return b"data: " + self.body(failure) + b"\n\ndata: [DONE]\n\n"


def failure_of(error: BaseException, request_id: str) -> Failure:
    """Return what a caller is told of an error. Of a fault of ours only its id is told; the log has the rest."""
    if isinstance(error, ApiError):
        return error.failure
    if isinstance(error, RequestError):
        return Failure(FailureKind.INVALID, str(error))
    if isinstance(error, OverloadedError):
        return Failure(FailureKind.OVERLOADED, str(error), code="overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, EngineUnavailableError):
        wait_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        # The cause may quote a path or a line of a traceback; it is in the log and at the operator's end only.
        return Failure(FailureKind.UNAVAILABLE, _UNAVAILABLE, code="engine_unavailable", retry_after_s=wait_s)
    message = f"the server failed on this request; its log has the cause under id {request_id}"
    return Failure(FailureKind.INTERNAL, message, code="internal_error")
