"""Who may run when: beside others, alone, or not yet."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Turns:
    """Requests run together, or one alone: what ends the engine then is that one's doing."""

    def __init__(self) -> None:
        self._door = asyncio.Lock()
        self._num_together = 0
        self._quiet = asyncio.Event()

    @asynccontextmanager
    async def together(self) -> AsyncGenerator[None, None]:
        """Run beside others; wait while one is alone, or waits to be."""
        async with self._door:
            self._num_together += 1
        try:
            yield
        finally:
            self._num_together -= 1
            self._quiet.set()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None, None]:
        """Run while nobody else does."""
        async with self._door:
            while self._num_together:
                self._quiet.clear()
                await self._quiet.wait()
            yield


class Room:
    """A place for a number of things that have a number of bytes together; one alone may have any."""

    def __init__(self, max_things: int, max_bytes: int) -> None:
        self._max_things = max_things
        self._max_bytes = max_bytes
        self._num_things = 0
        self._num_bytes = 0
        self._left = asyncio.Event()

    async def enter(self, num_bytes: int) -> None:
        """Wait until there is room for one more. For one caller at a time."""
        while self._num_things and (
            self._num_things >= self._max_things or self._num_bytes + num_bytes > self._max_bytes
        ):
            self._left.clear()
            await self._left.wait()
        self._num_things += 1
        self._num_bytes += num_bytes

    def leave(self, num_bytes: int) -> None:
        """Make room."""
        self._num_things -= 1
        self._num_bytes -= num_bytes
        self._left.set()
