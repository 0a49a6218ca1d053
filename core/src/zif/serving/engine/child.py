"""One engine process as its parent sees it: started, greeted, spoken to, and seen ending."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from zif.serving.engine.block_news import remove_sockets, to_launch
from zif.serving.engine.channel import ClientEnd, new_folder
from zif.serving.engine.limits import ProcessOptions
from zif.serving.engine.messages import Failed, FromEngine, Hello, Launch, MessageError, ToEngine, Welcome
from zif.settings import EngineSettings

logger = logging.getLogger(__name__)

# -P: a file in the working directory must not stand in for a module.
COMMAND = (sys.executable, "-P", "-m", "zif.serving.engine.process")

_STDERR = 2


class EngineChild:
    """An engine process. Make it on the event loop's thread, and keep that thread: its end ends the process.

    `on_message` hears all messages but Hello and Failed. `ended` gives the reason when the process is gone.
    """

    def __init__(
        self,
        settings: EngineSettings,
        options: ProcessOptions,
        on_message: Callable[[FromEngine], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._reason: str | None = None
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self._kv_events = options.kv_events
        folder = new_folder()
        limits = options.limits
        launch = Launch(
            folder=str(folder),
            parent_pid=os.getpid(),
            name=options.name or Path(settings.model).resolve().name,
            settings=asdict(settings),
            max_queued=limits.max_queued,
            max_queued_tokens=limits.max_queued_tokens,
            report_s=limits.report_s,
            log_level=logging.getLogger().getEffectiveLevel(),
            kv_events=to_launch(options.kv_events),
        )
        # In a process group of its own: a terminal's Ctrl-C is for the parent, which then drains.
        command = options.command or COMMAND
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=_STDERR, process_group=0)
        channel: ClientEnd | None = None
        try:
            # The child hears the folder's name before the folder exists, so that one of the two can always remove it.
            self._write(msgspec.json.encode(launch) + b"\n")
            channel = self._channel = ClientEnd(folder, self._hear, self._give_up)
            threading.Thread(target=self._wait, name="engine-watch", daemon=True).start()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._close_pipe()
            if channel is not None:
                channel.close()
            raise

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def send(self, message: ToEngine) -> bool:
        """Send a message. False when the process is gone. Raises `MessageError` when it is too large."""
        return self._channel.send(message)

    def read(self) -> None:
        """Hand on what has arrived, without waiting for the event loop to come to it."""
        self._channel.read()

    def kill(self, reason: str) -> None:
        """End the process at once. Harmless when it is gone."""
        self._reason = self._reason or reason
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # A child that dies at once closes the pipe; its end is heard of like any other.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _close_pipe(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _hear(self, message: Any) -> None:
        if isinstance(message, Hello):
            self._channel.remove_folder()
            self._channel.send(Welcome())
        elif isinstance(message, Failed):
            self._reason = self._reason or message.message
        else:
            self._on_message(message)

    def _give_up(self, error: MessageError) -> None:
        logger.error("the engine process %d is killed: %s", self.pid, error)
        self.kill(f"the engine process sent nonsense: {error}")

    def _wait(self) -> None:
        """Wait for the end of the process, in a thread."""
        status = self._process.wait()
        # Without an event loop nobody waits for the news.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, status)

    def _end(self, status: int) -> None:
        """Hear what the process said last, then say that it is gone."""
        self._channel.read_all()
        self._channel.close()
        self._close_pipe()
        remove_sockets(self._kv_events)
        if not self.ended.done():
            self.ended.set_result(self._reason or _ending(status))


def _ending(status: int) -> str:
    if status < 0:
        return f"the engine process was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the engine process ended with status {status}"
