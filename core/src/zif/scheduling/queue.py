"""The waiting line, ordered by policy. Preempted requests return to their old place because the order is a key."""

import heapq
from collections.abc import Callable

from zif.contract import Request
from zif.errors import ConfigError

OrderKey = tuple[int, ...]

POLICIES: dict[str, Callable[[Request], OrderKey]] = {
    "fcfs": lambda request: (request.arrival,),
    "priority": lambda request: (request.priority, request.arrival),
}
"""Smaller keys run first. Under "priority" a smaller number is more urgent, ties go to the earlier arrival."""


def order_key(policy: str) -> Callable[[Request], OrderKey]:
    """Return the order of `policy`; raise `ConfigError` when there is none of this name."""
    if policy not in POLICIES:
        raise ConfigError(f"scheduling_policy={policy!r} is unknown; choose one of {', '.join(sorted(POLICIES))}")
    return POLICIES[policy]


class RequestQueue:
    """Waiting requests, first the one with the smallest key."""

    def __init__(self, key: Callable[[Request], OrderKey]) -> None:
        self._key = key
        self._heap: list[tuple[OrderKey, int, Request]] = []
        self._live: set[int] = set()

    def __len__(self) -> int:
        return len(self._live)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        self._live.add(request.request_id)
        heapq.heappush(self._heap, (self._key(request), request.request_id, request))

    def peek(self) -> Request | None:
        """Return the first request without taking it."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        """Take the first request; the queue must not be empty."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._live.discard(request.request_id)
        return request

    def discard(self, request: Request) -> None:
        """Forget a request, wherever it stands."""
        self._live.discard(request.request_id)
