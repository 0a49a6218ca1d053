"""How samples end, and how the answers to several prompts are read at once."""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from zif.contract import NO_TOKEN_LEFT
from zif.serving.http.errors import ApiError, FailureKind

T = TypeVar("T")

_INTERNALS = re.compile(r"0x[0-9a-fA-F]{6,}|(^|[\s'\"(])/[\w.-]+/")
"""An address, or an absolute path."""


def check_end(finish_reason: str | None, error: str | None) -> None:
    """Raise ApiError when a sample ended by a fault or its time limit, which the API has no finish reason for.

    Options that left a sample no token are the caller's mistake, though it may show only after some tokens.
    """
    if finish_reason == "abort":
        raise ApiError(
            FailureKind.TIMEOUT, f"the answer was ended before its end: {_told(error)}", code="generation_aborted"
        )
    if finish_reason == "error" and error is not None and error.startswith(NO_TOKEN_LEFT):
        raise ApiError(FailureKind.INVALID, error, code="no_token_left")
    if finish_reason == "error":
        raise ApiError(FailureKind.INTERNAL, f"the answer failed: {_told(error)}", code="generation_failed")


def _told(error: str | None) -> str:
    """Return an error of the engine as callers may read it: without what it shows of this machine."""
    return error if error and not _INTERNALS.search(error) else "the engine gave it up"


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """What source `source` gave; None when it has ended."""

    source: int
    value: T | None


async def merged(sources: Sequence[AsyncGenerator[T, None]], at_once: int) -> AsyncGenerator[Item[T], None]:
    """Read `at_once` of the sources at a time and give what they give, each source's values in its order.

    Closing this closes them all; so does an error of one, which is raised.
    """
    if len(sources) == 1:
        try:
            async for value in sources[0]:
                yield Item(0, value)
            yield Item(0, None)
        finally:
            await sources[0].aclose()
        return
    reading: dict[asyncio.Task[T | None], int] = {}
    waiting = iter(range(len(sources)))
    try:
        while True:
            while len(reading) < at_once and (index := next(waiting, None)) is not None:
                reading[_next_of(sources[index])] = index
            if not reading:
                return
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = reading.pop(task)
                found = task.result()
                if found is not None:
                    reading[_next_of(sources[index])] = index
                yield Item(index, found)
    finally:
        await _end(list(reading), sources)


def _next_of(source: AsyncGenerator[T, None]) -> "asyncio.Task[T | None]":
    async def take() -> T | None:
        return await anext(source, None)

    return asyncio.create_task(take())


async def _end(tasks: "Sequence[asyncio.Task[T | None]]", sources: Sequence[AsyncGenerator[T, None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for source in sources:
        await source.aclose()
