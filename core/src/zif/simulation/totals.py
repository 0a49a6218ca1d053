"""What a simulation checks how often, and what it met."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CheckIntervals:
    """How often, in steps, the checks run that look at everything; the others run at every step in every row.

    `everything`: hands, census, and each request's blocks. `integrity`: the block manager's own structures, rebuilt.
    """

    everything: int = 1
    integrity: int = 32


@dataclass(frozen=True, slots=True)
class Totals:
    """What one simulation met, to show that it met anything. `strikes` counts injected faults by point."""

    num_steps: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_saved_blocks: int = 0
    num_loaded_blocks: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    strikes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.num_steps + other.num_steps,
            self.num_requests + other.num_requests,
            self.num_tokens + other.num_tokens,
            self.num_cached_tokens + other.num_cached_tokens,
            self.num_preemptions + other.num_preemptions,
            self.num_drafted_tokens + other.num_drafted_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            self.num_saved_blocks + other.num_saved_blocks,
            self.num_loaded_blocks + other.num_loaded_blocks,
            self.finished + other.finished,
            self.strikes + other.strikes,
        )
