"""How much may be outstanding, and when to come again when it is too much.

The client asks before it sends, so that a refusal does not wait for a step; the engine asks again, because it trusts
no peer with its memory.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from zif.serving.answers import ModelInfo

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0

_REMEMBERED_ENDS = 64


@dataclass(frozen=True, slots=True)
class Capacity:
    """What runs at once, and what may wait beside it."""

    max_running: int
    max_running_tokens: int
    max_queued: int
    max_queued_tokens: int

    @property
    def max_samples(self) -> int:
        """Count the samples that may be outstanding."""
        return self.max_running + self.max_queued

    @property
    def max_tokens(self) -> int:
        """Count the prompt tokens that may be outstanding."""
        return self.max_running_tokens + self.max_queued_tokens


class Admission:
    """Count outstanding samples and prompt tokens against a capacity."""

    def __init__(self, capacity: Capacity, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._num_samples = 0
        self._num_tokens = 0
        self._ends: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED_ENDS)

    @property
    def num_samples(self) -> int:
        """Count the outstanding samples."""
        return self._num_samples

    def impossible(self, num_samples: int) -> str | None:
        """Say why a request could never be taken; None when it could."""
        limit = self._capacity.max_samples
        if num_samples <= limit:
            return None
        return f"n={num_samples} exceeds the {limit} samples that may run and wait at once; ask for fewer"

    def refusal(self, num_samples: int, num_tokens: int) -> str | None:
        """Say why a request cannot be taken now; None when it can. An idle engine takes a prompt of any length."""
        capacity = self._capacity
        if self._num_samples + num_samples > capacity.max_samples:
            return f"{self._num_samples} samples run or wait and the limit is {capacity.max_samples}; come again later"
        if self._num_samples and self._num_tokens + num_tokens > capacity.max_tokens:
            return (
                f"{self._num_tokens} prompt tokens run or wait and the limit is {capacity.max_tokens}; "
                "come again later, or send a shorter prompt"
            )
        return None

    def add(self, num_samples: int, num_tokens: int) -> None:
        """Count a request that was taken."""
        self._num_samples += num_samples
        self._num_tokens += num_tokens

    def remove(self, num_samples: int, num_tokens: int) -> None:
        """Count a request that has ended."""
        self._num_samples -= num_samples
        self._num_tokens -= num_tokens
        self._ends.append((self._clock(), num_samples))

    def retry_after_s(self) -> float:
        """Return in how many seconds half of what waits will have run, at the pace of the last ends."""
        num_waiting = max(self._num_samples - self._capacity.max_running, 1)
        if len(self._ends) < 2:
            return MIN_RETRY_S
        seconds = self._clock() - self._ends[0][0]
        pace = sum(num_samples for _, num_samples in self._ends) / max(seconds, 1e-3)
        return min(max(num_waiting / 2 / pace, MIN_RETRY_S), MAX_RETRY_S)


def capacity_of(info: ModelInfo, max_queued: int, max_queued_tokens: int) -> Capacity:
    """Return the capacity of the engine that serves a model."""
    kv_tokens = info.num_kv_blocks * info.block_size
    running_tokens = min(kv_tokens, info.max_num_seqs * info.max_model_len)
    return Capacity(info.max_num_seqs, running_tokens, max_queued, max_queued_tokens)
