"""Which requests are past their deadline. `scheduler.py` asks once per step; without deadlines that costs nothing."""

import heapq

from zif.contract import Request

_MIN_DEAD_ENTRIES = 64


class Deadlines:
    """The requests that carry a deadline, the earliest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._num_live = 0

    def add(self, request: Request) -> None:
        """Watch a request, if it has a deadline."""
        if request.deadline_s is not None:
            self._num_live += 1
            heapq.heappush(self._heap, (request.deadline_s, request.request_id, request))

    def remove(self, request: Request) -> None:
        """Hear that a request has ended."""
        if request.deadline_s is None:
            return
        self._num_live -= 1
        if len(self._heap) > 2 * self._num_live + _MIN_DEAD_ENTRIES:
            self._heap = [entry for entry in self._heap if not entry[2].finished]
            heapq.heapify(self._heap)

    def pop_passed(self, now_s: float) -> list[Request]:
        """Take the unfinished requests whose deadline is not after `now_s`."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            request = heapq.heappop(self._heap)[2]
            if not request.finished:
                passed.append(request)
        return passed

    def __bool__(self) -> bool:
        return bool(self._heap)


def overdue_error(request: Request, now_s: float) -> str:
    """Say how far a request got before its deadline."""
    late_s = now_s - (now_s if request.deadline_s is None else request.deadline_s)
    return (
        f"the deadline passed {late_s:.3f} s ago, with {request.num_output_tokens} tokens generated; "
        "allow more time or send less at once"
    )
