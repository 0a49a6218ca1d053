"""How long each phase of the engine's start took."""

import time
from collections.abc import Callable, Mapping

OnPhase = Callable[[str, int, int], None]
MAX_PHASES = 64
"""Phases are the engine's own and few; this holds if one day they are not."""


class PhaseTimes:
    """Hears the phases of a start, times them, and tells `listener`. Later starts take the place of earlier ones."""

    def __init__(self, listener: OnPhase, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener = listener
        self._clock = clock
        self._phase = ""
        self._is_done = False
        self._began_s = 0.0
        self._seconds: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Hear that `done` of `total` units of a phase are done. The phase before it has ended.

        A phase that is done and said so again still counts: what follows it has no phase of its own.
        """
        now_s = self._clock()
        if phase != self._phase:
            if self._phase and not self._is_done:
                self._note(now_s)
            self._phase, self._began_s = phase, now_s
        self._note(now_s)
        self._is_done = done >= total
        self._listener(phase, done, total)

    def seconds(self) -> Mapping[str, float]:
        """Return the seconds of each phase so far."""
        return self._seconds

    def _note(self, now_s: float) -> None:
        if self._phase in self._seconds or len(self._seconds) < MAX_PHASES:
            self._seconds[self._phase] = now_s - self._began_s
