"""A child that ends when its parent does, however that ended.

Two ways, because each has a gap: the kernel's signal works while the child's interpreter hangs, but only on Linux and
leaves the channel's folder; the end of the pipe on standard input works everywhere, but needs a thread that runs. So
the pipe guards while the folder exists, and the signal is added once it is gone. No zif module is imported here.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

PARENT_DIED = 75
"""The exit status of a child whose parent is gone."""

_PR_SET_PDEATHSIG = 1  # prctl(2)


def read_line(fd: int, max_bytes: int) -> bytes:
    """Read up to the first newline and nothing after it. Empty when the writer is gone before; raises `ValueError`."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            return b""
        line += byte
        if len(line) > max_bytes:
            raise ValueError(f"the first line is longer than {max_bytes} bytes")
    return bytes(line)


def end_with_pipe(fd: int, before: Callable[[], None]) -> None:
    """Exit at once, after calling `before`, when the writing end of a pipe is closed."""

    def wait() -> None:
        while os.read(fd, 4096):
            pass
        before()
        os._exit(PARENT_DIED)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the parent's thread that started it ends. Linux; elsewhere nothing."""
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(number)}")
    # A parent that died before the call sends no signal; its child has another parent by now.
    if os.getppid() != parent_pid:
        os._exit(PARENT_DIED)
