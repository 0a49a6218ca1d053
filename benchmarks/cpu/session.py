"""The processes of one session as the kernel accounts for them: processor time, memory, and their end.

A program that is started as the leader of a session of its own is found again with everything that it starts (vLLM
starts a process for its engine, zif one for its engine and some for its workers), is counted with it and ended with it.
"""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SESSION, _TIMES, _TIMES_OF_ENDED = 3, slice(11, 13), slice(13, 15)
"""Places in /proc/PID/stat, counted from its third field: session; utime, stime; cutime, cstime. Source: proc(5)."""


@dataclass(frozen=True, slots=True)
class Session:
    """The session that a process leads, by the id of that process."""

    leader: int

    def processes(self) -> list[int]:
        """Return every process of the session."""
        found = []
        for entry in Path("/proc").iterdir():
            fields = _stat(entry.name) if entry.name.isdigit() else []
            if fields and int(fields[_SESSION]) == self.leader:
                found.append(int(entry.name))
        return found

    def cpu_s(self) -> float:
        """Return the processor time of the processes, those that ended and were waited for included."""
        stats = [_stat(str(pid)) for pid in self.processes()]
        return sum(_seconds([*fields[_TIMES], *fields[_TIMES_OF_ENDED]]) for fields in stats)

    def peak_bytes(self) -> int:
        """Return the sum of the processes' largest resident memory, mapped files included."""
        return sum(_kilobytes(pid, "status", "VmHWM:") for pid in self.processes()) * 1024

    def resident_bytes(self) -> int:
        """Return the memory that the processes hold now; a page that several share counts once among them."""
        return sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in self.processes()) * 1024

    def without(self, library: Path) -> list[int]:
        """Return the processes that do not have the library loaded; one that has ended loads nothing and is none."""
        maps = {pid: _maps(pid) for pid in self.processes()}
        return [pid for pid, text in maps.items() if text and str(library) not in text]

    def kill(self) -> None:
        """End what is left of it at once."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of one process, all threads; 0.0 when it is gone."""
    return _seconds(_stat(str(pid))[_TIMES])


def _seconds(ticks: list[str]) -> float:
    return sum(int(count) for count in ticks) / TICKS_PER_S


def _stat(pid: str) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; nothing when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _maps(pid: int) -> str:
    """Return the files that a process has mapped; nothing when the process is gone."""
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def _kilobytes(pid: int, name: str, key: str) -> int:
    """Return a number of a file of /proc/PID in its unit; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(key))
