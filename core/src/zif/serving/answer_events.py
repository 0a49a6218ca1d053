"""Answers as the events of an API: what the streams of the Messages and the Responses API have in common."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from zif.serving.answer_parts import PartEvent
from zif.serving.chat.service import ChatAnswer, ChatDelta
from zif.serving.openai.samples import check_end


class EventWriter(Protocol):
    """Writes one answer in the words of an API. Fed with each delta, it holds the whole answer at the end."""

    def take(self, delta: ChatDelta) -> list[PartEvent]:
        """Take what the sample got; return what it means for the parts."""
        ...

    def begin(self) -> bytes:
        """Return the events that open a stream; called before the first delta is taken."""
        ...

    def frames(self, found: Sequence[PartEvent]) -> bytes:
        """Return the events that tell a client of changes of parts."""
        ...

    def end(self) -> bytes:
        """Return the events that close a stream whose answer has ended."""
        ...


async def read_whole(answer: ChatAnswer, writer: EventWriter) -> None:
    """Feed `writer` with the whole answer. Raises ApiError for one that ended by a fault, or what the engine raises."""
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            check_end(delta.finish_reason, delta.error)
            writer.take(delta)


async def event_frames(answer: ChatAnswer, writer: EventWriter) -> AsyncGenerator[bytes, None]:
    """Give an answer's events as they come; raises as `read_whole` does.

    The first waits for the engine, so that a refusal still becomes a status.
    """
    begun = False
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            check_end(delta.finish_reason, delta.error)
            opening = b"" if begun else writer.begin()
            begun = True
            if frames := opening + writer.frames(writer.take(delta)):
                yield frames
    yield writer.end()
