"""Answers as lines of a file, in the form of OpenAI's batch files.

    {"id": "batch_req_...", "custom_id": "a", "response": {"status_code", "request_id", "body"}, "error": null}

The id is a digest of the request, so that a line tells what it answers. `error` is for requests that were not asked.
"""

import msgspec

from zif.serving.batch.requests import BatchRequest, Fault, key_of

ID_PREFIX = "batch_req_"
LINE_BEGINNING = b'{"id":"batch_req_'
_FIRST_FAILURE = 400


class HttpAnswer(msgspec.Struct, frozen=True):
    """What a route answered. `body` is JSON without line breaks."""

    status_code: int
    request_id: str
    body: msgspec.Raw

    @property
    def failed(self) -> bool:
        """Say whether the status is one of an error."""
        return self.status_code >= _FIRST_FAILURE


class _AnswerLine(msgspec.Struct, frozen=True):
    id: str
    custom_id: str | None
    response: HttpAnswer | None
    error: Fault | None


class _Status(msgspec.Struct, frozen=True):
    status_code: int


class WrittenAnswer(msgspec.Struct, frozen=True):
    """What is read again of a line that was written: which request it answers, and whether well."""

    id: str
    custom_id: str | None
    response: _Status | None
    error: msgspec.Raw

    @property
    def key(self) -> bytes:
        """Return `BatchRequest.key` of the request. Raises `ValueError` when the line is of another program."""
        return self.digest if self.custom_id is None else key_of(self.custom_id)

    @property
    def digest(self) -> bytes:
        """Return `BatchRequest.digest` of the request. Raises `ValueError` when the line is of another program."""
        if not self.id.startswith(ID_PREFIX):
            raise ValueError(f"the id {self.id[:64]!r} does not begin with {ID_PREFIX!r}")
        return bytes.fromhex(self.id.removeprefix(ID_PREFIX))

    @property
    def failed(self) -> bool:
        """Say whether the request failed."""
        return self.response is None or self.response.status_code >= _FIRST_FAILURE


_encode = msgspec.json.Encoder().encode
_written_decoder = msgspec.json.Decoder(WrittenAnswer)


def answer_line(request: BatchRequest, answer: HttpAnswer | Fault) -> bytes:
    """Return the line that answers a request, with its end."""
    response, fault = (None, answer) if isinstance(answer, Fault) else (answer, None)
    return _encode(_AnswerLine(ID_PREFIX + request.digest.hex(), request.custom_id, response, fault)) + b"\n"


def read_answer_line(content: bytes) -> WrittenAnswer:
    """Return what a whole line says. Raises `ValueError` when it is no answer."""
    try:
        return _written_decoder.decode(content)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def may_be_torn(tail: bytes) -> bool:
    """Say whether what follows the last line break is a piece of an answer: its beginning, or what a crash left."""
    beginning = tail.rstrip(b"\0")[: len(LINE_BEGINNING)]
    return LINE_BEGINNING.startswith(beginning)
