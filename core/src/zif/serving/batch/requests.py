"""Requests as lines of a file, in the form of OpenAI's batch files: read one by one, never the whole file.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

A line that cannot be asked is a request with a fault, which is answered on its own line; the others go on.
Source: OpenAI's guide "Batch API".
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal

import msgspec

MAX_ID_CHARS = 512
SPARE_LINE_BYTES = 2**16
"""What a line may have beside its body."""

_DIGEST_BYTES = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_MESSAGE_CHARS = 300
_FAULTS_OF_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Fault(msgspec.Struct, frozen=True):
    """Why a request was not asked. `line` is its place in the input; `code` is a word for programs."""

    code: str
    message: str
    line: int


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input.

    `key` names it among all lines: two lines with one custom_id have the same. `digest` is of its content, 16 bytes
    both. With a `fault` there is nothing to ask, and `custom_id` is None where none could be read.
    """

    line: int
    key: bytes
    digest: bytes
    custom_id: str | None = None
    url: str = ""
    body: bytes = b""
    fault: Fault | None = None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARS)]
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARS)]


class _Streamed(msgspec.Struct):
    stream: Any = None


_line_decoder = msgspec.json.Decoder(_Line)
_named_decoder = msgspec.json.Decoder(_Named)
_streamed_decoder = msgspec.json.Decoder(_Streamed)


def read_requests(file: BinaryIO, max_body_bytes: int) -> Iterator[BatchRequest]:
    """Give the requests of a file, from its beginning, in order. Empty lines are passed over."""
    file.seek(0)
    max_bytes = max_body_bytes + SPARE_LINE_BYTES
    number = 0
    while content := file.readline(max_bytes + 1):
        number += 1
        if len(content) > max_bytes and not content.endswith(b"\n"):
            yield _too_long(file, content, number, max_bytes)
            continue
        if number == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        content = content.strip()
        if content:
            yield parse_request(content, number)


def parse_request(content: bytes, line: int) -> BatchRequest:
    """Return the request of a line; what is wrong with it is its fault."""
    try:
        asked = _line_decoder.decode(content)
    except _FAULTS_OF_JSON as error:
        return _faulty(content, line, error)
    body = bytes(asked.body)
    key, digest = key_of(asked.custom_id), _digest(asked.custom_id.encode(), asked.url.encode(), body)
    fault = None
    if _is_streamed(body):
        message = "'stream' is true, and an answer in a file cannot be a stream; leave it out"
        fault = Fault("stream_not_supported", message, line)
    return BatchRequest(line, key, digest, asked.custom_id, asked.url, body, fault)


def key_of(custom_id: str) -> bytes:
    """Return what stands for a custom_id where millions are kept."""
    return _digest(custom_id.encode())


def _faulty(content: bytes, line: int, error: Exception) -> BatchRequest:
    """Return the request of a line that is none, under its custom_id if it has one."""
    is_json = isinstance(error, msgspec.ValidationError)
    what = "the line is no request" if is_json else "the line is no valid JSON"
    message = f"{what}: {str(error)[:_MAX_MESSAGE_CHARS].replace('`', chr(39))}"
    fault = Fault("invalid_request" if is_json else "invalid_json", message, line)
    try:
        custom_id = _named_decoder.decode(content).custom_id
    except _FAULTS_OF_JSON:
        # Nothing but its place tells it from another such line with the same content.
        digest = _digest(b"%d" % line, content)
        return BatchRequest(line, digest, digest, fault=fault)
    return BatchRequest(line, key_of(custom_id), _digest(content), custom_id, fault=fault)


def _too_long(file: BinaryIO, begin: bytes, line: int, max_bytes: int) -> BatchRequest:
    """Return the request of a line that is too long to be held, and read on to its end."""
    hashed = hashlib.blake2b(b"%d:" % line + begin, digest_size=_DIGEST_BYTES)
    while part := file.readline(max_bytes):
        hashed.update(part)
        if part.endswith(b"\n"):
            break
    message = f"the line has more than {max_bytes} bytes; send less, or raise --max-body-bytes"
    digest = hashed.digest()
    return BatchRequest(line, digest, digest, fault=Fault("line_too_long", message, line))


def _is_streamed(body: bytes) -> bool:
    """Say whether a body asks for a stream. What is wrong with a body is told by the route that reads it."""
    try:
        return _streamed_decoder.decode(body).stream is True
    except _FAULTS_OF_JSON:
        return False


def _digest(*parts: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        hashed.update(b"%d:" % len(part))
        hashed.update(part)
    return hashed.digest()
