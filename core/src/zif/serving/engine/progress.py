"""Is an engine alive? It is when it speaks, and when steps are finished while there is work."""

import time
from collections.abc import Callable


class ProgressWatch:
    """Remember when an engine was last heard, and when it last got on."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._heard_s = self._moved_s = clock()

    def begin(self) -> None:
        """Start counting: an idle engine was given work, or one has become ready."""
        self._moved_s = self._clock()

    def heard(self) -> None:
        """Note that the engine sent something."""
        self._heard_s = self._clock()

    def moved(self) -> None:
        """Note that a step was finished, a request answered, or that a step is known to compile."""
        self._moved_s = self._clock()

    def problem(self, has_work: bool) -> str | None:
        """Say what is wrong, None when nothing is."""
        now = self._clock()
        silence_s, standstill_s = now - self._heard_s, now - self._moved_s
        limit = f"the limit is {self._limit_s:g} s"
        if silence_s > self._limit_s:
            return f"the engine has said nothing for {silence_s:.1f} s; {limit}"
        if has_work and standstill_s > self._limit_s:
            return f"the engine has work and finished no step for {standstill_s:.1f} s; {limit}"
        return None


class HangTimer:
    """Measure for how long a problem has lasted, look by look. A limit of 0 is never reached.

    Counts looks, not the clock: when all processes were stopped for a while, as in a frozen container, the first look
    afterwards finds an old problem and must not take it for a long one.
    """

    def __init__(self, limit_s: float, period_s: float) -> None:
        self._limit_s = limit_s
        self._period_s = period_s
        self._lasted_s: float | None = None

    def look(self, *, has_problem: bool) -> bool:
        """Take one look, `period_s` after the last. Say whether the problem has lasted for the limit."""
        if not has_problem:
            self._lasted_s = None
            return False
        self._lasted_s = 0.0 if self._lasted_s is None else self._lasted_s + self._period_s
        return 0 < self._limit_s <= self._lasted_s
