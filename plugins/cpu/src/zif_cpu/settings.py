"""The CPU plugin's own settings: the one place of this package that touches the environment. Called by the platform."""

import os
from collections.abc import Mapping
from pathlib import Path

from zif.host import threads

_THREAD_VARIABLES = ("ZIF_CPU_THREADS", "OMP_NUM_THREADS")


def num_threads(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the number of threads that computes, or None for one per usable core.

    `environ` None is the process's environment. `ZIF_CPU_THREADS` goes before `OMP_NUM_THREADS`. Raises `ConfigError`
    on a value that is no count of threads.
    """
    return threads.thread_count(os.environ if environ is None else environ, _THREAD_VARIABLES)


def instruction_set(environ: Mapping[str, str] | None = None) -> str | None:
    """Return what `ZIF_CPU_ISA` asks for, an instruction set of the native kernels or "torch"; None when it is unset.

    `environ` None is the process's environment. Whether it serves here is not looked at.
    """
    return (os.environ if environ is None else environ).get("ZIF_CPU_ISA") or None


def library_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the file that `ZIF_CPU_LIBRARY` names in place of the installed native library; None when it is unset.

    `environ` None is the process's environment.
    """
    named = (os.environ if environ is None else environ).get("ZIF_CPU_LIBRARY")
    return Path(named) if named else None


def keeps_memory(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether freed memory may stay with the process: unless the user tunes the C library's allocator.

    `environ` None is the process's environment. Source: mallopt(3), its environment variables.
    """
    environ = os.environ if environ is None else environ
    tuned = "MALLOC_MMAP_THRESHOLD_" in environ or "MALLOC_TRIM_THRESHOLD_" in environ
    return not tuned and "glibc.malloc" not in environ.get("GLIBC_TUNABLES", "")


def limit_spinning() -> None:
    """Let threads that wait sleep soon (`zif.host.threads.limit_spinning`). Mutates the process's environment."""
    threads.limit_spinning(os.environ)
