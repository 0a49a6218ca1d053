"""An engine that is never too busy: a prompt waits for its place in the queue, where a server's client is told to go.

Preparing a request (its template, its tokens) has a line of its own, with less room than the engine's queue; so
requests hold a place among those that prepare until they come to the engine.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from typing import Protocol

from zif.contract import SamplingParams
from zif.serving.answers import AnswerDelta, EngineAround, EngineClient, EnginePrompt, OverloadedError
from zif.serving.engine.admission import Admission, Capacity

MAX_PREPARING = 64


class RestartedEngine(EngineClient, Protocol):
    """An engine that may crash and come back."""

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises `EngineUnavailableError` when they never will be."""
        ...


class _Place:
    """A request's place among those that prepare."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._held = True

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._places.release()


_place: ContextVar[_Place | None] = ContextVar("zif_batch_place", default=None)


class PatientEngine(EngineAround[RestartedEngine]):
    """Pass everything on to `engine`, and each prompt when `capacity` has room for it, in order of arrival."""

    def __init__(self, engine: RestartedEngine, capacity: Capacity) -> None:
        super().__init__(engine)
        self._admission = Admission(capacity)
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()
        self._places = asyncio.Semaphore(MAX_PREPARING)

    def check_room(self) -> None:
        """There is room for all: prompts wait here."""

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises `EngineUnavailableError` when they never will be."""
        await self._engine.wait_ready()

    @asynccontextmanager
    async def preparing(self) -> AsyncGenerator[None, None]:
        """Hold a place among the requests that prepare, until this one comes to the engine, or ends."""
        await self._places.acquire()
        place = _Place(self._places)
        token = _place.set(place)
        try:
            yield
        finally:
            _place.reset(token)
            place.leave()

    async def generate(
        self, prompt: EnginePrompt, sampling: SamplingParams, priority: int = 0
    ) -> AsyncGenerator[AnswerDelta, None]:
        place = _place.get()
        if place is not None:
            place.leave()
        num_samples, num_tokens = sampling.n, len(prompt.token_ids)
        while True:
            began = False
            await self._enter(num_samples, num_tokens)
            try:
                async with aclosing(self._engine.generate(prompt, sampling, priority)) as deltas:
                    async for delta in deltas:
                        began = True
                        yield delta
                return
            except OverloadedError as error:
                # The engine counts what was left by others until it has ended it.
                if began:
                    raise
                retry_s = error.retry_after_s
            finally:
                self._leave(num_samples, num_tokens)
            await asyncio.sleep(retry_s)

    async def _enter(self, num_samples: int, num_tokens: int) -> None:
        async with self._turn:
            # What is impossible goes on: the engine says why.
            while not self._admission.impossible(num_samples) and self._admission.refusal(num_samples, num_tokens):
                self._ended.clear()
                await self._ended.wait()
            self._admission.add(num_samples, num_tokens)

    def _leave(self, num_samples: int, num_tokens: int) -> None:
        self._admission.remove(num_samples, num_tokens)
        self._ended.set()
