"""Writes log lines, and lines for people, from a thread of its own: a reader who stands still stops nobody else.

A bounded number of lines waits. Those that find no place are counted, and the count is a line as soon as there is room.
"""

import contextlib
import io
import json
import logging
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Final, TextIO

from zif.serving.telemetry.access_log import JsonLines

MAX_WAITING_LINES: Final = 10_000
CLOSE_S: Final = 2.0
"""How long the end waits for lines to be written."""


def unlocked_stderr() -> TextIO:
    """Return standard error without a buffer.

    The lock of a buffer is held while somebody waits for its reader; the interpreter, when it exits, would wait too.
    """
    if sys.stderr is None:  # closed before the start: its number may be another file's by now
        return Path(os.devnull).open("w", encoding="utf-8")
    raw = io.FileIO(sys.stderr.fileno(), "w", closefd=False)
    return io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)


class LineWriter(logging.Handler):
    """A log handler that formats at once, as `JsonLines`, never waiting for `stream`. Close it to have all written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self._stream = stream
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write, name="log-lines", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a line in the queue, or count it as lost."""
        try:
            self.write(self.format(record) + "\n")
        except Exception:  # as every handler: a line that cannot be formatted is reported, not raised
            self.handleError(record)

    def write(self, text: str) -> None:
        """Put text in the queue as it is, with the ends of its lines, or count it as lost."""
        try:
            self._waiting.put_nowait(text)
        except queue.Full:
            self._num_lost += 1

    def close(self) -> None:
        """Write what waits, for two seconds at most. Idempotent."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        super().close()

    def _write(self) -> None:
        while (text := self._waiting.get()) is not None:
            num_lost, self._num_lost = self._num_lost, 0
            if num_lost:
                text += json.dumps({"level": "warning", "message": "log lines were lost", "lost": num_lost}) + "\n"
            # Nobody reads any more, or the disk is full: there is nowhere left to say so.
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(text)
                if self._waiting.empty():
                    self._stream.flush()
