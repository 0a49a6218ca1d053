"""An engine's counts over all its processes: what a new one counts comes on top of what the dead ones had."""

import msgspec

from zif.serving.answers import EngineStats

COUNTERS = (
    "num_steps",
    "num_prompt_tokens",
    "num_generated_tokens",
    "num_cached_tokens",
    "num_prefix_queries",
    "num_preemptions",
    "num_drafted_tokens",
    "num_accepted_tokens",
)
"""The fields of `EngineStats` that only grow while one process lives."""


class TotalsOverRestarts:
    """Add up. What a process did after its last report died with it."""

    def __init__(self) -> None:
        self._base = dict.fromkeys(COUNTERS, 0)
        self._newest: EngineStats | None = None
        self._num_restarts = 0

    def take(self, stats: EngineStats) -> EngineStats:
        """Return a process's report with the counts of those before it added."""
        counts = {name: getattr(stats, name) + base for name, base in self._base.items()}
        self._newest = msgspec.structs.replace(stats, num_restarts=self._num_restarts, **counts)
        return self._newest

    def begin_anew(self) -> None:
        """Hear that the next report is of a new process."""
        self._num_restarts += 1
        if self._newest is not None:
            self._base = {name: getattr(self._newest, name) for name in COUNTERS}
