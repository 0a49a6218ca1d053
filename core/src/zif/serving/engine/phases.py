"""Telling the client how a start goes while it blocks the main thread."""

import queue
import threading
from types import TracebackType

from zif.serving.engine.channel import EngineEnd
from zif.serving.engine.messages import Starting

REPEAT_S = 1.0
"""How often a phase that does not change is reported."""


class PhaseReports:
    """Send phases as they come, and the current one again every `repeat_s`, from a thread.

    Inside its `with` block the channel belongs to the thread, before and after to the caller.
    """

    def __init__(self, end: EngineEnd, repeat_s: float = REPEAT_S) -> None:
        self._end = end
        self._repeat_s = repeat_s
        self._phases: queue.SimpleQueue[Starting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="phase-reports", daemon=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Hear that `done` of `total` units of a phase are done."""
        self._phases.put(Starting(phase, done, total))

    def __enter__(self) -> "PhaseReports":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._phases.put(None)
        self._thread.join()

    def _send(self) -> None:
        current: Starting | None = Starting("importing the engine", 0, 1)
        while current is not None:
            # A client that does not read misses reports of progress; the next one says as much.
            self._end.send(current)
            try:
                current = self._phases.get(timeout=self._repeat_s)
            except queue.Empty:
                continue
            current = self._newest(current)

    def _newest(self, current: Starting | None) -> Starting | None:
        """Pass over reports of a phase that a later report of the same phase has overtaken."""
        while current is not None and not self._phases.empty():
            following = self._phases.get()
            if following is None or following.phase != current.phase:
                self._end.send(current)
            current = following
        return current
