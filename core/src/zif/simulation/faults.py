"""Faults by name: at which call of which point something goes wrong.

A `FaultSchedule` is a value that prints as text and is read back from it, so that a run can be repeated from one
command line; a `FaultInjector` counts the calls of one run.
"""

import random
from dataclasses import dataclass
from enum import StrEnum

from zif.errors import ConfigError

_RANDOM, _NONE = "random", "none"
_LASTING = "+"
_RATES = (0.0, 0.0, 0.01, 0.05)
_CRASH_SHARE = 0.1
"""A crash ends every request, so that many of them would leave little to see of the rest."""


class FaultPoint(StrEnum):
    """Where a fault can be injected, and what must come of it.

    ALLOCATION: a reservation of blocks fails; requests are preempted or wait, all get their text. STEP: the runner
    reports a fault of one request; it ends with an error, the others go on. NONSENSE: it reports that what one request
    computed is not to be used, and blocks of it hold anything; it ends with an error or, if it had found blocks,
    computes everything itself, and nobody ever reads the nonsense. RAISE: from now on steps with one request raise; it
    ends with an error, the others go on. CRASH: the runner raises; every live
    request ends with an error and nothing leaks. DUPLICATE: a result is applied once more; nothing changes. STALE: the
    result of an earlier step arrives first; it is refused or ignored. LATE: the result comes after one more step was
    planned than should be under way. REORDERED: that of a later step arrives first; it is refused. TRANSFER: a copy of
    a block is lost when it is to be loaded; its request computes it again. ABORT: a request is aborted, between any two
    calls; so are one that is over and one that never was. CLOCK: the clock jumps ahead by a day.
    """

    ALLOCATION = "allocation"
    STEP = "step"
    CRASH = "crash"
    DUPLICATE = "duplicate"
    STALE = "stale"
    LATE = "late"
    REORDERED = "reordered"
    TRANSFER = "transfer"
    ABORT = "abort"
    CLOCK = "clock"
    NONSENSE = "nonsense"
    RAISE = "raise"


@dataclass(frozen=True, slots=True)
class FaultSchedule:
    """Which faults strike: at the n-th call of a point, and with a rate per call.

    As text: "none", "random" (rates drawn from the seed), or a list such as "allocation@17,abort@3+", where + means
    that every later call fails too.
    """

    nth: tuple[tuple[FaultPoint, int], ...] = ()
    lasting: tuple[tuple[FaultPoint, int], ...] = ()
    rates: tuple[tuple[FaultPoint, float], ...] = ()

    @classmethod
    def parse(cls, text: str, seed: int) -> "FaultSchedule":
        """Read a schedule. Raises `ConfigError` on an unknown point or a number below 1."""
        if text == _NONE:
            return cls()
        if text == _RANDOM:
            return cls.draw(seed)
        entries = [entry.strip() for entry in text.split(",")]
        lasting = tuple(_parse_one(entry) for entry in entries if entry.endswith(_LASTING))
        return cls(nth=tuple(_parse_one(entry) for entry in entries if not entry.endswith(_LASTING)), lasting=lasting)

    @classmethod
    def draw(cls, seed: int) -> "FaultSchedule":
        """Draw a rate for every point; half of the points stay quiet."""
        chance = random.Random(f"faults:{seed}")
        rates = [(point, chance.choice(_RATES)) for point in FaultPoint]
        return cls(
            rates=tuple((point, rate * (_CRASH_SHARE if point is FaultPoint.CRASH else 1)) for point, rate in rates)
        )


class FaultInjector:
    """Count the calls of every point at which faults are due, and say which of them fail."""

    def __init__(self, schedule: FaultSchedule, seed: int) -> None:
        self._nth = frozenset(schedule.nth)
        self._lasting = dict(schedule.lasting)
        self._rates = {point: rate for point, rate in schedule.rates if rate}
        self._random = random.Random(f"strikes:{seed}")
        self._calls = dict.fromkeys(FaultPoint, 0)
        self._strikes = dict.fromkeys(FaultPoint, 0)
        self._armed = {*self._rates, *self._lasting, *(point for point, _ in self._nth)}

    def strikes(self, point: FaultPoint) -> bool:
        """Say whether this call of `point` fails."""
        if point not in self._armed:
            return False
        calls = self._calls[point] = self._calls[point] + 1
        rate = self._rates.get(point)
        lasting = self._lasting.get(point)
        if not (
            (rate is not None and self._random.random() < rate)
            or (point, calls) in self._nth
            or (lasting is not None and calls >= lasting)
        ):
            return False
        self._strikes[point] += 1
        return True

    def num_strikes(self, point: FaultPoint) -> int:
        """Count the faults injected at a point so far."""
        return self._strikes[point]


def _parse_one(entry: str) -> tuple[FaultPoint, int]:
    name, _, number = entry.removesuffix(_LASTING).partition("@")
    if name not in set(FaultPoint) or not number.isdecimal() or int(number) < 1:
        points = ", ".join(FaultPoint)
        raise ConfigError(f"fault {entry!r} is not POINT@N with N of at least 1 and POINT one of {points}")
    return FaultPoint(name), int(number)
