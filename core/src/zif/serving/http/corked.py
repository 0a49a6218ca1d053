"""A transport that sends what was written within one turn of the event loop at once.

The head of an answer, its first event and its end are written one by one; each as a packet of its own would cost a
system call here and a wake-up at the client. What waits is at most one turn old and at most `_MAX_HELD_BYTES` long.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

_MAX_HELD_BYTES = 2**16


class CorkedTransport(asyncio.Transport):
    """Passes everything on to `transport`; `write` waits for the end of the loop's turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held: list[bytes | bytearray | memoryview] = []
        self._num_held_bytes = 0
        self._num_written_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hold the data until the loop's turn ends, or until much is held."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._num_held_bytes += len(data)
        self._num_written_bytes += len(data)
        if self._num_held_bytes > _MAX_HELD_BYTES:
            self._flush()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Hold each."""
        for data in list_of_data:
            self.write(data)

    def close(self) -> None:
        """Send what is held, and close when that has been read."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once; what is held is lost."""
        self._held, self._num_held_bytes = [], 0
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + self._num_held_bytes

    def num_taken_bytes(self) -> int:
        """Return how much of what was written the system has taken, which it does as the other side reads."""
        return self._num_written_bytes - self.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def _flush(self) -> None:
        held, self._held, self._num_held_bytes = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))
