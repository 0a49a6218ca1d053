"""One HTTP exchange as handlers see it: who asks for what, and the answer or the stream that they give back."""

import hashlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"


class AuthScope(StrEnum):
    """What a key must allow for a route. PUBLIC needs no key."""

    PUBLIC = "public"
    INFERENCE = "inference"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `tenant` goes into `EnginePrompt.tenant`; neither field tells the key."""

    tenant: str = ""
    salt: str = ""

    def cache_salt(self, asked: str = "") -> str:
        """Return what goes into `EnginePrompt.cache_salt`, given the salt that the request asks for, or none.

        Another key's salt cannot be forged: the asked one is hashed together with the caller's own.
        """
        if not asked:
            return self.salt
        return hashlib.sha256(f"{len(self.salt)}:{self.salt}{asked}".encode()).hexdigest()[:32]


class Headers:
    """The headers of a request. Names are compared in lower case; of several values the first counts."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Sequence[tuple[bytes, bytes]]) -> None:
        """Take the pairs as ASGI has them: names in lower case."""
        self._pairs = pairs

    def get(self, name: str) -> str | None:
        """Return the first value of a header, None when it is absent."""
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for key, value in self._pairs if key == wanted), None)

    def all(self, name: str) -> list[str]:
        """Return every value of a header, in order."""
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for key, value in self._pairs if key == wanted]


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request when it has ended: for the access log, metrics and traces. No content.

    The server fills in the first group, handlers the second as far as they get. Times are of `time.monotonic`.
    """

    request_id: str
    route: str = ""
    method: str = ""
    tenant: str = ""
    client_request_id: str | None = None
    traceparent: str | None = None
    started_s: float = field(default_factory=time.monotonic)
    responded_s: float | None = None
    ended_s: float | None = None
    status: int = 0
    failure: str | None = None
    """The `FailureKind` that it was answered with, also one in the middle of a stream."""
    aborted: bool = False
    """The client left before the end."""

    model: str | None = None
    streamed: bool = False
    num_samples: int = 1
    max_tokens: int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    queue_s: float | None = None
    """How long its first prompt waited for its first step, in seconds."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Request(Generic[T]):
    """A request that passed every check: `body` is an instance of the route's request type, None when it has none.

    `path_value` is what stood for `{name}` at the end of the route's path. `id` is random and ours; what the client
    sent as x-request-id is never used as one.
    """

    body: T
    headers: Headers
    caller: Caller
    record: RequestRecord
    path: str
    query: Mapping[str, str]
    path_value: str = ""
    unknown_fields: tuple[str, ...] = ()
    """Top-level keys of the body that the request type does not have; in strict mode they were refused."""

    @property
    def id(self) -> str:
        """Return the server's own id of this request."""
        return self.record.request_id


@dataclass(slots=True)
class Response:
    """A whole answer. Header names are lower case."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """An answer as server-sent events. `frames` yields whole frames as made by `event`; several may be joined.

    The status is decided when the first frame is there, or the first keep-alive is due: an error raised before that
    still becomes a status, so take the engine's first delta before yielding anything. An error raised later ends the
    stream with the frame of the route's `ErrorStyle`. When the client leaves, what `frames` waits for is cancelled and
    `frames` is closed at once: close the engine's generator there (`async with contextlib.aclosing(...)`).
    """

    frames: AsyncGenerator[bytes, None]
    keep_alive: bytes = KEEP_ALIVE_COMMENT
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a value as JSON. Takes structs, dataclasses, and what JSON has."""
    return Response(msgspec.json.encode(value), status, headers=headers or {})


def event(data: bytes, name: str = "") -> bytes:
    """Return one server-sent event. `data` holds no line break, as encoded JSON does not."""
    if name:
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
    return b"data: " + data + b"\n\n"
