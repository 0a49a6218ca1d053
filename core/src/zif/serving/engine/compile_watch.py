"""Vouching for a step that compiles: while one does, the client is told so, and does not take it for a hung one.

Steps are not meant to compile: warm-up does (contract 10.11), and a form of structured output is compiled before its
request is taken. What is left is a shape that warm-up did not foresee and a form that was forgotten meanwhile. Nothing
announces these, so a thread looks where the main thread stands, and only in steps that take long.
"""

import sys
import threading
import time
from types import FrameType, TracebackType

from zif.serving.engine.channel import EngineEnd
from zif.serving.engine.messages import Compiling

COMPILERS = ("triton.compiler", "torch._dynamo", "torch._inductor", "zif.structured.compiler")
"""Packages and modules whose functions compile."""

PERIOD_S = 1.0
LIMIT_S = 600.0
"""A compilation that takes longer is not vouched for any more."""


class CompileWatch:
    """Send `Compiling` every `period_s` while the thread that made this one compiles, from `start` to `close`.

    Inside its `with` block, which may be entered any number of times, the channel belongs to the watch.
    """

    def __init__(self, end: EngineEnd, period_s: float = PERIOD_S, limit_s: float = LIMIT_S) -> None:
        self._end = end
        self._period_s = period_s
        self._limit_s = limit_s
        self._watched = threading.get_ident()
        self._entered_s: float | None = None
        self._channel = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="compile-watch", daemon=True)
        self._channel.acquire()

    def start(self) -> None:
        """Begin to watch the thread that made this."""
        self._thread.start()

    def __enter__(self) -> "CompileWatch":
        self._entered_s = time.monotonic()
        self._channel.release()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.acquire()
        self._entered_s = None

    def close(self) -> None:
        """End the thread. Outside the `with` block."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._period_s):
            # Held by the watched thread outside the block, where nothing long happens and the channel is its own.
            if not self._channel.acquire(blocking=False):
                continue
            try:
                self._look()
            finally:
                self._channel.release()

    def _look(self) -> None:
        entered_s = self._entered_s
        if entered_s is None or not self._period_s <= time.monotonic() - entered_s <= self._limit_s:
            return
        compiler = compiler_of(sys._current_frames().get(self._watched))
        if compiler is not None:
            self._end.send(Compiling(compiler))


def compiler_of(frame: FrameType | None) -> str | None:
    """Return the compiler that a stack is in, None when it is in none."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        for compiler in COMPILERS:
            if module == compiler or module.startswith(compiler + "."):
                return compiler
        frame = frame.f_back
    return None
