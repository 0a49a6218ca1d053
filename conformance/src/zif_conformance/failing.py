"""Devices that fail on purpose, for level L7: from outside, by wrapping what the platform opens, or from within.

`FailingDevices` lets the n-th call of a service raise; any platform can be tested so. What cannot be done from outside,
such as a kernel that hangs, is asked of the platform's own injector where its notes name one ("faults: VARIABLE"); the
language is that of `zif_conformance.reference_platform.faults`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from zif.contract import Capabilities, Device, EagerGraphs
from zif_conformance.claims import INJECTION_NOTE
from zif_conformance.subject import Subject


class FailingDevices:
    """Wraps `Platform.open` for one test. `opened` are the devices that were opened since."""

    def __init__(self, subject: Subject, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[Device] = []
        self.num_calls = 0
        self._service = self._method = ""
        self._number = 0
        self._error: Callable[[], Exception] | None = None
        original = type(subject.platform).open

        @functools.wraps(original)
        def opening(platform: Any, plan: Any, rank: int) -> Device:
            device = original(platform, plan, rank)
            self._wrap(device)
            self.opened.append(device)
            return device

        patch.setattr(type(subject.platform), "open", opening)

    def fail(self, service: str, method: str, number: int, error: Callable[[], Exception]) -> None:
        """Let the `number`-th call of a method of a service raise, on each device that is opened from now on."""
        self._service, self._method, self._number, self._error = service, method, number, error
        self.num_calls = 0

    def heal(self) -> None:
        """Let nothing fail on devices that are opened from now on."""
        self._error = None

    def allocated_bytes(self) -> int:
        """Sum what the devices opened so far still lend."""
        return sum(device.allocator.stats().allocated_bytes for device in self.opened)

    def _wrap(self, device: Device) -> None:
        if self._error is None:
            return
        service, counter, raised = getattr(device, self._service), itertools.count(1), self._error
        original = getattr(service, self._method)

        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            number = next(counter)
            self.num_calls = number
            if number == self._number:
                raise raised()
            return original(*arguments, **options)

        setattr(service, self._method, call)
        device.graphs = EagerGraphs()  # a captured step calls no method that could raise


def injector_variable(capabilities: Capabilities) -> str:
    """Return the environment variable of the platform's own fault injector; tests claim `INJECTION` before."""
    notes = (note for note in capabilities.notes if note.startswith(INJECTION_NOTE))
    return next(notes).removeprefix(INJECTION_NOTE).strip()
