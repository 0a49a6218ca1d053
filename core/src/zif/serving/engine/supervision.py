"""When to start a crashed engine again, and when to give up."""

import time
from collections import deque
from collections.abc import Callable

from zif.serving.engine.limits import RestartLimits


class RestartPolicy:
    """Back off, and stop at a crash loop."""

    def __init__(self, limits: RestartLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._crashes: deque[float] = deque()

    @property
    def num_recent_crashes(self) -> int:
        """Count the crashes within the window."""
        self._forget_old()
        return len(self._crashes)

    def delay_after_crash(self) -> float | None:
        """Count a crash and return after how many seconds to start again; None in a crash loop."""
        self._crashes.append(self._clock())
        num_crashes = self.num_recent_crashes
        if num_crashes > self._limits.max_restarts:
            return None
        return min(self._limits.first_delay_s * 2.0 ** (num_crashes - 1), self._limits.max_delay_s)

    def _forget_old(self) -> None:
        while self._crashes and self._clock() - self._crashes[0] > self._limits.window_s:
            self._crashes.popleft()
