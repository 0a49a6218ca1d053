"""The requests that an engine has not ended, as its client keeps them: a stream each, counted by admission."""

import secrets

from zif.errors import RequestError
from zif.serving.answers import AnswerDelta, EngineUnavailableError, OverloadedError
from zif.serving.engine.admission import Admission
from zif.serving.engine.streams import AnswerStream


class OutstandingRequests:
    """Streams by id. `admission` is set once an engine has told its capacity, and anew by each that is started."""

    def __init__(self) -> None:
        self.admission: Admission | None = None
        self._streams: dict[int, AnswerStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, stream: AnswerStream) -> bool:
        return stream.id in self._streams

    def open(self, num_samples: int, num_tokens: int) -> AnswerStream:
        """Return the stream of a request that may be taken; `add` counts it.

        Raises `RequestError` for one that never could be, `OverloadedError` for one that cannot be now.
        """
        impossible = self._known_admission().impossible(num_samples)
        if impossible is not None:
            raise RequestError(impossible)
        self.check_room(num_samples, num_tokens)
        return AnswerStream(secrets.randbits(63), num_samples, num_tokens)

    def check_room(self, num_samples: int, num_tokens: int) -> None:
        """Raise `OverloadedError` when a request of this size cannot be taken now."""
        admission = self._known_admission()
        refusal = admission.refusal(num_samples, num_tokens)
        if refusal is not None:
            raise OverloadedError(refusal, admission.retry_after_s())

    def add(self, stream: AnswerStream) -> None:
        """Count a request that was sent."""
        self._streams[stream.id] = stream
        self._known_admission().add(stream.num_samples, stream.num_tokens)

    def take(self, request_id: int, delta: AnswerDelta) -> None:
        """Hand on what the engine sent. Nothing happens for a request that has ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            if delta.finished:
                self._end(stream)
            stream.put(delta)

    def fail(self, request_id: int, error: Exception) -> None:
        """End a request with an error. Nothing happens for one that has ended."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._end(stream)
            stream.fail(error)

    def fail_all(self, reason: str, retry_after_s: float) -> None:
        """End every request: the engine is gone, or as good as gone."""
        for stream in list(self._streams.values()):
            self._end(stream)
            stream.fail(EngineUnavailableError(f"the engine ended while it answered: {reason}", retry_after_s))

    def _end(self, stream: AnswerStream) -> None:
        del self._streams[stream.id]
        stream.ended = True
        self._known_admission().remove(stream.num_samples, stream.num_tokens)

    def _known_admission(self) -> Admission:
        assert self.admission is not None, "an engine that is ready has told its capacity"
        return self.admission
