"""A pair of ZeroMQ sockets over a Unix socket: one end for the engine's loop, one for an event loop.

The socket lies in a folder of mode 0700 with a random name, and only while the connection is made: the client removes
the folder on the engine's Hello, so that whoever dies later leaves nothing. Sockets are of the kind PAIR: a second
peer is not let in. The engine's end holds back when the client does not read; the client's end never blocks, because
what it sends is bounded by the admission of requests.
"""

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from zif.serving.engine.messages import MAX_MESSAGE_BYTES, Codec, FromEngine, MessageError, ToEngine

SOCKET_NAME = "s"
MAX_SOCKET_PATH = 100
"""Bytes; Linux takes 107 (unix(7)), other systems a few less."""

_MAX_PER_TURN = 16
"""Messages that one turn of the event loop reads, so that no turn is long."""

_HELD_MESSAGES = 64
"""Messages of the engine that may wait unread in either process; later answers are merged."""


def new_folder(parent: str | None = None) -> Path:
    """Return the path of a folder that does not exist, with a name that nobody can guess."""
    folder = Path(parent or tempfile.gettempdir()) / f"zif-engine-{secrets.token_hex(12)}"
    num_bytes = len(os.fsencode(folder / SOCKET_NAME))
    if num_bytes > MAX_SOCKET_PATH:
        raise OSError(
            f"the socket's path {str(folder)!r} has {num_bytes} bytes and the limit is {MAX_SOCKET_PATH}; "
            "set TMPDIR to a shorter folder"
        )
    return folder


def remove_folder(folder: Path) -> None:
    """Remove a channel's folder. Harmless when it is gone."""
    with contextlib.suppress(OSError):
        (folder / SOCKET_NAME).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _has(socket: "zmq.Socket[bytes]", event: zmq.PollEvent) -> bool:
    return bool(int(socket.get(zmq.EVENTS)) & event)


class EngineEnd:
    """The engine's end. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._codec = Codec(ToEngine)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.set(zmq.SNDHWM, _HELD_MESSAGES)
        self._socket.set(zmq.RECONNECT_IVL, 5)
        self._socket.connect(f"ipc://{folder / SOCKET_NAME}")

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message. False when none came in time."""
        return bool(self._socket.poll(round(timeout_s * 1000)))

    def receive(self, max_messages: int = 4096) -> list[Any]:
        """Return the messages that are there. Raises `MessageError`."""
        messages: list[Any] = []
        while len(messages) < max_messages and _has(self._socket, zmq.POLLIN):
            messages.append(self._codec.decode(self._socket.recv()))
        return messages

    def can_send(self) -> bool:
        """Say whether one more message would be taken."""
        return _has(self._socket, zmq.POLLOUT)

    def send(self, message: FromEngine) -> bool:
        """Send a message. False, and nothing sent, when the client has not read enough. Raises `MessageError`."""
        data = self._codec.encode(message)
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, linger_s: float = 0.0) -> None:
        """Close, after at most `linger_s` for what is not sent yet. Idempotent."""
        if not self._socket.closed:
            self._socket.close(linger=round(linger_s * 1000))
            self._context.term()


class ClientEnd:
    """The client's end, read by the running event loop.

    `on_message` hears each message, `on_fault` hears once of what is none; nothing is read after that.
    """

    def __init__(
        self, folder: Path, on_message: Callable[[Any], None], on_fault: Callable[[MessageError], None]
    ) -> None:
        self._folder = folder
        self._on_message = on_message
        self._on_fault = on_fault
        self._codec = Codec(FromEngine)
        self._loop = asyncio.get_running_loop()
        folder.mkdir(mode=0o700)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        try:
            self._socket.set(zmq.LINGER, 0)
            self._socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._socket.set(zmq.SNDHWM, 0)
            self._socket.set(zmq.RCVHWM, _HELD_MESSAGES)
            self._socket.bind(f"ipc://{folder / SOCKET_NAME}")
            self._fd = int(self._socket.get(zmq.FD))
            self._loop.add_reader(self._fd, self.read)
        except BaseException:
            self._release()
            raise

    def remove_folder(self) -> None:
        """Remove the socket from the file system; the connection stays."""
        remove_folder(self._folder)

    def send(self, message: ToEngine) -> bool:
        """Send a message. False when nobody is there to take it. Raises `MessageError` when it is too large."""
        data = self._codec.encode(message)
        if self._socket.closed:
            return False
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        # The descriptor tells of a message once, and sending may have taken the news (zmq_getsockopt(3), ZMQ_FD).
        if _has(self._socket, zmq.POLLIN):
            self._loop.call_soon(self.read)
        return True

    def read(self) -> None:
        """Hand on the messages that are there, at most as many as one turn of the event loop should take."""
        for _ in range(_MAX_PER_TURN):
            if self._socket.closed or not _has(self._socket, zmq.POLLIN):
                return
            data = self._socket.recv(zmq.NOBLOCK)
            try:
                message = self._codec.decode(data)
            except MessageError as error:
                self.close()
                self._on_fault(error)
                return
            self._on_message(message)
        self._loop.call_soon(self.read)

    def read_all(self) -> None:
        """Hand on every message that is there: nothing comes after."""
        while not self._socket.closed and _has(self._socket, zmq.POLLIN):
            self.read()

    def close(self) -> None:
        """Close and remove the folder. Idempotent."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._release()

    def _release(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self.remove_folder()
