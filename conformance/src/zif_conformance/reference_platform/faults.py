"""Faults on purpose, to show that whoever uses a device survives them. None is injected unless asked for.

    allocation=3      the 3rd allocation finds no memory
    hang=5@2.5        the 5th kernel hangs for 2.5 s
    late=0.01         every kernel's result comes 0.01 s late
    lose=7            the device is lost at the 7th kernel: from then on nothing works
    stall=1@2.5       rank 1 comes 2.5 s late to every collective
    die=1@4           the process of rank 1 ends at its 4th collective

Several are separated by commas. A hang is bounded, so that a test that meets it ends. A vendor's plugin has no such
file, or has one that makes its driver fail.
"""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from zif.errors import ConfigError, OutOfMemoryError, PlatformUnavailableError

_EXIT_DEAD_RANK = 13
_NAP_S = 0.005


@dataclass(frozen=True, slots=True)
class Moment:
    """The `count`-th call, or rank `count`, and a time in seconds or a number of calls that goes with it."""

    count: int
    amount: float = 0.0


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on one device; None is what does not. Counts begin with 1."""

    allocation: Moment | None = None
    hang: Moment | None = None
    late: Moment | None = None
    lose: Moment | None = None
    stall: Moment | None = None
    die: Moment | None = None


def parse_faults(variable: str, text: str) -> Faults:
    """Read a list of faults. Raises `ConfigError`, naming `variable`, on one that does not exist or has no number."""
    faults = Faults()
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        first, _, second = value.partition("@")
        try:
            moment = Moment(0, float(first)) if name == "late" else Moment(int(first), float(second or 0))
            faults = replace(faults, **{name: moment})
        except (ValueError, TypeError) as error:
            known = ", ".join(Faults.__dataclass_fields__)
            raise ConfigError(
                f"{variable}: {part!r} is no fault; write NAME=N or NAME=N@M with one of {known}"
            ) from error
    return faults


class FaultInjector:
    """Counts what one device is asked for, and lets the chosen calls fail."""

    def __init__(self, faults: Faults, device_id: str, rank: int) -> None:
        self._faults = faults
        self._device_id = device_id
        self._rank = rank
        self._allocations: Iterator[int] = itertools.count(1)
        self._kernels: Iterator[int] = itertools.count(1)
        self._collectives: Iterator[int] = itertools.count(1)
        self._lost = False

    def allocation(self) -> None:
        """Count an allocation. Raises `OutOfMemoryError` when it is the one that fails."""
        self._check_device()
        chosen = self._faults.allocation
        if chosen is not None and next(self._allocations) == chosen.count:
            raise OutOfMemoryError(f"allocation {chosen.count} on {self._device_id!r} fails by request; allocate again")

    def kernel(self) -> None:
        """Count a kernel that starts. Raises `PlatformUnavailableError` when the device is lost."""
        number = next(self._kernels)
        if self._faults.lose is not None and number >= self._faults.lose.count:
            self._lost = True
        self._check_device()
        if self._faults.hang is not None and number == self._faults.hang.count:
            _wait(self._faults.hang.amount)
        if self._faults.late is not None:
            _wait(self._faults.late.amount)

    def collective(self) -> None:
        """Count a collective that starts; a stalled rank comes late, a dying one ends its process here."""
        self._check_device()
        number = next(self._collectives)
        die, stall = self._faults.die, self._faults.stall
        if die is not None and die.count == self._rank and number >= die.amount:
            os._exit(_EXIT_DEAD_RANK)
        if stall is not None and stall.count == self._rank:
            _wait(stall.amount)

    def _check_device(self) -> None:
        if self._lost:
            raise PlatformUnavailableError(f"device {self._device_id!r} is lost; close it and open it again")


def _wait(seconds: float) -> None:
    """Wait in naps, so that an interrupt is heard."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_S))
