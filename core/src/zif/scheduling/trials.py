"""Who may run after a step raised: the requests of that step by halves, until the one that makes steps raise is alone.

    a b c d e f g h    the step raised, everyone waits again
    a b c d            they run; cleared when each has computed what the failed step would have
    a b c d | e f      joins those that are cleared; a step raises, everyone waits again
    e                  alone: a step raises, and e is guilty

Only who ran alone is found guilty. Nobody else is admitted until all are cleared. Steps that keep raising, whoever
runs, are the engine's fault: then there is no hope. `scheduler.py` asks and tells, `planner.py` asks whom to admit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from zif.contract import Request

MAX_FAILURES = 4
"""As many of these in a row leave no hope: requests found guilty without one good step between them, or trials that
found nobody guilty with fewer than `GOOD_STEPS` between them."""
GOOD_STEPS = 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a failed step shows: who made it raise, if that is known; or that it is not the fault of any request."""

    guilty: int | None = None
    hopeless: bool = False


class Trials:
    """The suspects, by request id. `_groups` are tried from the last to the first."""

    def __init__(self) -> None:
        self._groups: list[set[int]] = []
        self._cleared: set[int] = set()
        self._ends: dict[int, int] = {}
        self._num_failures = 0
        self._num_good_steps = 0
        self._found_guilty = False

    def admits(self, request: Request) -> bool:
        """Say whether a waiting request may start."""
        return not self._groups or request.request_id in self._groups[-1] or request.request_id in self._cleared

    def blame(self, ends: Mapping[int, int], *, alone: bool) -> Verdict:
        """Hear that a step raised. `ends` are the tokens that its live requests would have computed by then, by id.

        `alone` says whether it had no other requests, those that have ended since included.
        """
        if not self._groups:
            self._found_guilty = False
        suspects = sorted(ends.keys() - self._cleared) or sorted(ends)
        self._ends.update(ends)
        self._cleared.clear()
        self._groups = [group for group in (g.difference(suspects) for g in self._groups) if group]
        if alone and suspects:
            self._found_guilty = True
            self._count(num_good_steps=1)
            return Verdict(None if self._is_hopeless else suspects[0], self._is_hopeless)
        middle = len(suspects) // 2
        self._groups += [half for half in (set(suspects[middle:]), set(suspects[:middle])) if half]
        if not self._groups:
            self._count(num_good_steps=GOOD_STEPS)
        return Verdict(hopeless=self._is_hopeless)

    def note_step(self) -> None:
        """Hear that a step gave its result."""
        self._num_good_steps += 1

    def settle(self, live: Mapping[int, Request]) -> None:
        """Clear the suspects that have computed what the failed step would have, and go on to the next ones."""
        while self._groups:
            group = self._groups[-1]
            over = {number for number in group if number not in live or self._is_cleared(live[number])}
            self._cleared |= over
            group -= over
            if group:
                return
            self._groups.pop()
            if not self._groups:
                self._end()

    def _is_cleared(self, request: Request) -> bool:
        return request.num_computed_tokens >= self._ends[request.request_id]

    def _end(self) -> None:
        self._cleared.clear()
        self._ends.clear()
        if not self._found_guilty:
            self._count(num_good_steps=GOOD_STEPS)

    @property
    def _is_hopeless(self) -> bool:
        return self._num_failures >= MAX_FAILURES and self._num_good_steps < GOOD_STEPS

    def _count(self, num_good_steps: int) -> None:
        """Count a failure, and those before it unless so many good steps lie between."""
        self._num_failures = 1 if self._num_good_steps >= num_good_steps else self._num_failures + 1
        self._num_good_steps = 0
