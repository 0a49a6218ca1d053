"""The files that answers are written to, which are also the record of what is done: no other state is kept.

An answer is one write of one whole line at the end of a file, so a process that is killed leaves whole lines and at
most one torn one, which the next run cuts off. Files are flushed to the disk every `SYNC_S` and at the end: a machine
that loses its power may lose the answers of the last moments, and their requests are asked again.
"""

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from zif.errors import ConfigError
from zif.serving.batch.answer_lines import HttpAnswer, WrittenAnswer, answer_line, may_be_torn, read_answer_line
from zif.serving.batch.requests import BatchRequest, Fault

SYNC_S = 1.0
STANDARD_STREAM = "-"

_Found = Callable[[WrittenAnswer], None]


class AnswerFile:
    """A file that answers are appended to; `-` is standard output, which is not read again."""

    def __init__(self, name: str) -> None:
        """Open the file and lock it. Raises `ConfigError` when it cannot be written, or another run writes it."""
        self.name = name
        self._unsynced = False
        try:
            self._fd = self._open()
        except OSError as error:
            raise ConfigError(f"cannot write the file {name!r}: {error.strerror}; choose another") from error
        self.is_file = stat.S_ISREG(os.fstat(self._fd).st_mode) and name != STANDARD_STREAM
        if self.is_file:
            self._lock()

    def recover(self, found: _Found) -> None:
        """Tell `found` of every answer that is there, and cut off a torn last line.

        Raises `ConfigError` when there is something else in the file; nothing of it is changed then.
        """
        if not self.is_file:
            return
        offset = 0
        with Path(self.name).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    if not may_be_torn(line):
                        raise self._foreign(number, offset, "it has no end")
                    break
                try:
                    answer = read_answer_line(line)
                    found(answer)
                except ValueError as error:
                    raise self._foreign(number, offset, str(error)[:200]) from error
                offset += len(line)
        os.ftruncate(self._fd, offset)

    def append(self, line: bytes) -> None:
        """Write a line at the end. Raises `ConfigError` when that fails; the next run cuts off what is half there."""
        self._unsynced = True
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Have the disk keep what was written."""
        if not self._unsynced or not self.is_file:
            return
        self._unsynced = False
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        if self.name != STANDARD_STREAM:
            os.close(self._fd)

    def _open(self) -> int:
        if self.name == STANDARD_STREAM:
            return sys.stdout.fileno()
        fd = os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        # A new file is kept only with the entry of its folder.
        folder = os.open(Path(self.name).parent, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            os.fsync(folder)
        os.close(folder)
        return fd

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ConfigError(
                f"another process writes the file {self.name!r}; wait for it, or name another file"
            ) from error

    def _foreign(self, number: int, offset: int, reason: str) -> ConfigError:
        return ConfigError(
            f"line {number} of the file {self.name!r}, at byte {offset}, is no answer of a batch: {reason}; name "
            "another file, or cut this one there"
        )

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"cannot write the file {self.name!r}: {error.strerror}; what it holds is kept: mend that and run the same "
            "command again"
        )


class Journal:
    """What was answered before, and where answers go: all into one file, or those that failed into another."""

    def __init__(self, output: str, errors: str | None = None) -> None:
        """Open the files and read what is there. Raises `ConfigError`."""
        if errors is not None and Path(output).resolve() == Path(errors).resolve():
            raise ConfigError(f"the file {output!r} cannot take both answers and errors; name two, or only one")
        self._done: dict[bytes, bytes] = {}
        self.num_failed = 0
        self._output = AnswerFile(output)
        self._files = [self._output]
        try:
            if errors is not None:
                self._files.append(AnswerFile(errors))
            for file in self._files:
                file.recover(self._found)
        except BaseException:
            self.close()
            raise

    @property
    def num_done(self) -> int:
        """Count the requests that were answered before this run."""
        return len(self._done)

    @property
    def output_name(self) -> str:
        """Return the name of the file of answers."""
        return self._output.name

    def has(self, request: BatchRequest) -> bool:
        """Say whether a request was answered before. Raises `ConfigError` when another one with its id was."""
        digest = self._done.get(request.key)
        if digest is None:
            return False
        if digest != request.digest:
            raise ConfigError(
                f"line {request.line} of the input, custom_id {request.custom_id!r}, is not the request that was "
                "answered under this id before; remove that answer, or name another output"
            )
        return True

    def write(self, request: BatchRequest, answer: HttpAnswer | Fault) -> None:
        """Append an answer. Raises `ConfigError` when it cannot be written."""
        failed = isinstance(answer, Fault) or answer.failed
        self._files[-1 if failed else 0].append(answer_line(request, answer))

    def sync(self) -> None:
        """Have the disk keep what was written. Takes the time of a disk."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _found(self, answer: WrittenAnswer) -> None:
        self._done[answer.key] = answer.digest
        self.num_failed += answer.failed
