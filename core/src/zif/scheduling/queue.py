"""The waiting requests, in policy order. Preempted ones have an order already and return to their old place."""

import heapq
from dataclasses import dataclass, field

from zif.contract import Request
from zif.scheduling.policies import Order, Policy

_MIN_DEAD_ENTRIES = 16


@dataclass(slots=True)
class _Line:
    """A heap of requests; those that left it without being taken stay as dead entries until they surface."""

    heap: list[tuple[Order, int, Request]] = field(default_factory=list)
    live: set[int] = field(default_factory=set)

    def push(self, key: Order, request: Request) -> None:
        self.live.add(request.request_id)
        heapq.heappush(self.heap, (key, request.request_id, request))

    def discard(self, request_id: int) -> None:
        self.live.discard(request_id)
        if len(self.heap) > 2 * len(self.live) + _MIN_DEAD_ENTRIES:
            self.heap = [entry for entry in self.heap if entry[1] in self.live]
            heapq.heapify(self.heap)
        while self.heap and self.heap[0][1] not in self.live:
            heapq.heappop(self.heap)


class RequestQueue:
    """Waiting requests, first the one that the policy wants first."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._lines: dict[str, _Line] = {}
        self._heads: list[tuple[Order, int, str]] = []
        self._resumed = _Line()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, request: Request) -> None:
        """Let a request wait."""
        if not request.order and self._policy.line(request) not in self._lines:
            self._policy.wake(self._policy.line(request))
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Let a request wait that was taken only to look behind it."""
        self._num_waiting += 1
        if request.order:
            self._resumed.push(request.order, request)
        else:
            line = self._lines.setdefault(self._policy.line(request), _Line())
            line.push(self._policy.urgency(request), request)
            if line.heap[0][2] is request:
                self.reconsider(self._policy.line(request))

    def peek(self) -> Request | None:
        """Return the first request without taking it."""
        line = self._first_line()
        return line.heap[0][2] if line else None

    def order_of(self, request: Request) -> Order:
        """Return the order that a waiting request has, or would get if it were admitted now."""
        return request.order or (self._policy.tag(self._policy.line(request)), *self._policy.urgency(request))

    def pop(self) -> Request:
        """Take the first request; the queue must not be empty."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        self.discard(request)
        return request

    def discard(self, request: Request) -> None:
        """Forget a waiting request, wherever it stands."""
        name = self._policy.line(request)
        line = self._resumed if request.order else self._lines.get(name)
        if line is None or request.request_id not in line.live:
            return
        self._num_waiting -= 1
        line.discard(request.request_id)
        if not line.live and line is not self._resumed:
            del self._lines[name]

    def reconsider(self, name: str) -> None:
        """Hear that the tag of a line may have fallen; that it has risen is noticed without."""
        line = self._lines.get(name)
        if line is None:
            return
        heapq.heappush(self._heads, self._head(name, line))
        if len(self._heads) > 2 * len(self._lines) + _MIN_DEAD_ENTRIES:
            self._heads = [self._head(*entry) for entry in self._lines.items()]
            heapq.heapify(self._heads)

    def _head(self, name: str, line: _Line) -> tuple[Order, int, str]:
        first = line.heap[0][2]
        return (self.order_of(first), first.request_id, name)

    def _first_line(self) -> _Line | None:
        line = self._first_new_line()
        if not self._resumed.live:
            return line
        is_first = line is None or self._resumed.heap[0][0] < self.order_of(line.heap[0][2])
        return self._resumed if is_first else line

    def _first_new_line(self) -> _Line | None:
        """Return the line with the smallest order. Entries of `_heads` may lag behind, never be ahead."""
        while self._heads:
            name = self._heads[0][2]
            line = self._lines.get(name)
            if line is None:
                heapq.heappop(self._heads)
                continue
            head = self._head(name, line)
            if head == self._heads[0]:
                return line
            heapq.heapreplace(self._heads, head)
        return None
