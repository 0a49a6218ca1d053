"""The time of a simulation: it passes when told to, and jumps when a fault says so."""


class SimulatedClock:
    """A monotonic clock in seconds that only `advance` moves."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the time in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises `ValueError` when told to go back: monotonic clocks do not."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot advance by {seconds!r} s; give 0 or more")
        self._now_s += seconds
