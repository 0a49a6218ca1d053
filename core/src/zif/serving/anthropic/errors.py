"""Failures in the form of Anthropic's API, which its clients turn into their exceptions.

Source: docs.anthropic.com, "Errors".
"""

from typing import Any, Literal

import msgspec

from zif.serving.http.errors import STATUS_OF, Failure, FailureKind
from zif.serving.http.exchange import event

TYPES = {
    FailureKind.AUTHENTICATION: "authentication_error",
    FailureKind.PERMISSION: "permission_error",
    FailureKind.NOT_FOUND: "not_found_error",
    FailureKind.TOO_LARGE: "request_too_large",
    FailureKind.TIMEOUT: "timeout_error",
    FailureKind.INTERNAL: "api_error",
    FailureKind.UNAVAILABLE: "api_error",
}
OVERLOADED_STATUS = 529


class AnthropicError(msgspec.Struct, frozen=True):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorAnswer(msgspec.Struct, frozen=True):
    """What a request that failed is answered with."""

    error: AnthropicError
    type: Literal["error"] = "error"


class AnthropicErrors:
    """Errors as `{"type": "error", "error": {"type", "message"}}`."""

    answer_type: Any = AnthropicErrorAnswer

    def status(self, failure: Failure) -> int:
        """Return the usual status, 529 where the server as a whole has too much to do."""
        return OVERLOADED_STATUS if _is_overloaded(failure) else STATUS_OF[failure.kind]

    def body(self, failure: Failure) -> bytes:
        """Return the error object."""
        return msgspec.json.encode(AnthropicErrorAnswer(AnthropicError(error_type(failure), failure.message)))

    def frame(self, failure: Failure) -> bytes:
        """Return the error as the event that ends a stream."""
        return event(self.body(failure), "error")


def error_type(failure: Failure) -> str:
    """Return Anthropic's word for a failure."""
    if failure.kind is FailureKind.OVERLOADED:
        return "overloaded_error" if _is_overloaded(failure) else "rate_limit_error"
    return TYPES.get(failure.kind, "invalid_request_error")


def _is_overloaded(failure: Failure) -> bool:
    """Say whether all callers are too many, and not this one: a queue that is full is nobody's own limit."""
    return failure.kind is FailureKind.OVERLOADED and failure.code in (None, "overloaded")
