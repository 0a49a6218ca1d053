"""Bodies: read under limits of size and time, looked over, and decoded into a route's request type.

Everything about a body that is the caller's fault is an `ApiError` that names the field where there is one.
"""

import asyncio
import codecs
import itertools
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from zif.serving.http.errors import ApiError, FailureKind
from zif.serving.http.exchange import JSON, Headers
from zif.serving.http.json_scan import JsonLimitError, JsonScan
from zif.serving.http.settings import ServeSettings

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_SLICE_BYTES = 2**20
_BYTES_PER_S = 2**16
_MAX_MESSAGE_CHARS = 300
_MAX_UNKNOWN_FIELDS = 64
_RETRY_AFTER_S = 1.0
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]{0,200})`$")
_MISSING = re.compile(r"Object missing required field `([^`]{1,200})`")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]{1,200})`")


class ClientGoneError(Exception):
    """The client left before it had its answer; nobody is there to be told."""


class BodyBudget:
    """What the bodies of all requests under way may take together, in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class BodyShare:
    """What one request's body takes of the budget, from its first byte until the request has ended."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Take more. Raises `ApiError` when there is not so much left."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise ApiError(
                FailureKind.UNAVAILABLE,
                f"the bodies of requests under way take all of {self._budget.max_bytes} bytes; send this again later",
                code="too_many_body_bytes",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._budget.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Give everything back. Idempotent."""
        self._budget.num_bytes -= self._num_bytes
        self._num_bytes = 0


class BodyReader:
    """Reads and decodes the bodies of one route. Made once, as making a decoder is not free."""

    def __init__(self, request_type: type[msgspec.Struct], settings: ServeSettings, max_bytes: int | None) -> None:
        self._decoder = msgspec.json.Decoder(request_type)
        self._fields = frozenset(name.encode() for name in request_type.__struct_encode_fields__)
        self._settings = settings
        self._max_bytes = settings.max_body_bytes if max_bytes is None else min(max_bytes, settings.max_body_bytes)

    async def read(self, receive: Receive, headers: Headers, share: BodyShare) -> "DecodedBody":
        """Return the body as its struct, with the top-level keys that the struct does not have.

        `share` is charged with the body's bytes as they come; its owner releases it.

        Raises `ApiError`, and `ClientGoneError` when the client leaves meanwhile.
        """
        self._check_headers(headers)
        content = await self._receive_all(receive, share)
        await _check_utf8(content)
        scan = JsonScan(content, self._settings.max_json_depth, self._settings.max_json_values)
        try:
            for _ in scan.slices():
                await asyncio.sleep(0)
        except JsonLimitError as error:
            raise ApiError(FailureKind.INVALID, str(error), param=error.key, code="invalid_json") from error
        unknown = self._unknown(scan.top_level_keys)
        if unknown and self._settings.strict:
            raise _invalid(f"unknown field {unknown[0][:64]!r}; leave it out", unknown[0][:64], "unknown_parameter")
        decoded = DecodedBody(self._decode(content), unknown)
        if len(content) > _SLICE_BYTES:
            # A handler goes on with texts that are as long; others get their turn first.
            await asyncio.sleep(0)
        return decoded

    def _unknown(self, keys: set[bytes]) -> tuple[str, ...]:
        """Return the keys that no field has, sorted, but no more than anybody reads."""
        found = itertools.islice((key for key in keys if key not in self._fields), _MAX_UNKNOWN_FIELDS)
        return tuple(sorted(key.decode("utf-8", "replace") for key in found))

    def _check_headers(self, headers: Headers) -> None:
        """Refuse by the headers alone what they already show to be refused."""
        media_type = (headers.get("content-type") or "").partition(";")[0].strip().lower()
        if media_type != JSON:
            # A page of another site may send the simple types without asking, but not this one.
            raise ApiError(FailureKind.MEDIA_TYPE, f"send the body as JSON, with the header 'content-type: {JSON}'")
        if (headers.get("content-encoding") or "identity").lower() != "identity":
            raise ApiError(FailureKind.MEDIA_TYPE, "compressed bodies are not taken; leave 'content-encoding' out")
        length = headers.get("content-length")
        if length is not None and (not length.isascii() or not length.isdigit() or len(length) > 18):
            raise _invalid("the header content-length is no number", None, "invalid_header")
        if length is not None and int(length) > self._max_bytes:
            raise self._too_large()

    async def _receive_all(self, receive: Receive, share: BodyShare) -> bytes:
        """Return the whole body. Never holds more than the limit and one message of the connection."""
        begin_s = asyncio.get_running_loop().time()
        deadline_s = begin_s + self._settings.body_timeout_s
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await _receive_until(receive, deadline_s + num_bytes / _BYTES_PER_S)
            if message["type"] != "http.request":
                raise ClientGoneError
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            share.take(len(part))
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            FailureKind.TOO_LARGE,
            f"the body is longer than {self._max_bytes} bytes; send less, or raise max_body_bytes of the server",
            code="body_too_large",
        )

    def _decode(self, content: bytes) -> msgspec.Struct:
        try:
            return self._decoder.decode(content)
        except msgspec.ValidationError as error:
            raise _validation_failure(str(error)) from error
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise _invalid(
                f"the body is no valid JSON: {str(error)[:_MAX_MESSAGE_CHARS]}", None, "invalid_json"
            ) from error


class DecodedBody(msgspec.Struct, frozen=True):
    """A body as its struct, and the top-level keys that the struct does not have."""

    value: msgspec.Struct
    unknown_fields: tuple[str, ...]


async def _receive_until(receive: Receive, deadline_s: float) -> MutableMapping[str, Any]:
    try:
        async with asyncio.timeout_at(deadline_s):
            return await receive()
    except TimeoutError:
        raise ApiError(FailureKind.TIMEOUT, "the body came too slowly; send it again", code="body_timeout") from None


async def _check_utf8(content: bytes) -> None:
    """Refuse what is no UTF-8, also in keys and strings that are skipped, which the decoder does not look at."""
    if content.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for begin in range(0, len(content), _SLICE_BYTES):
            decoder.decode(content[begin : begin + _SLICE_BYTES], begin + _SLICE_BYTES >= len(content))
            if len(content) > _SLICE_BYTES:
                await asyncio.sleep(0)
    except UnicodeDecodeError as error:
        raise _invalid("the body is no valid UTF-8; send JSON in UTF-8", None, "invalid_utf8") from error


def _validation_failure(message: str) -> ApiError:
    """Return what the caller is told of a decoder's message: the field's path becomes `param`."""
    path = _PATH.search(message)
    param = path[1] if path else ""
    text = message[: path.start()] if path else message
    named = _MISSING.match(text) or _UNKNOWN.match(text)
    if named:
        param = f"{param}.{named[1]}" if param else named[1]
    text = text.replace("`", "'")[:_MAX_MESSAGE_CHARS]
    return _invalid(f"{param}: {text}" if param else text, param or None, "invalid_value")


def _invalid(message: str, param: str | None, code: str) -> ApiError:
    return ApiError(FailureKind.INVALID, message, param=param, code=code)
