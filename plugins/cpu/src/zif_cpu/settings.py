"""The CPU plugin's own settings: the one place of this package that reads the environment. Called by the device."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zif.errors import ConfigError

_THREAD_VARIABLES = ("ZIF_CPU_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class CpuSettings:
    """`num_threads` is the number of threads that computes, or None for one per usable core."""

    num_threads: int | None = None


def read_settings(environ: Mapping[str, str] | None = None) -> CpuSettings:
    """Read the settings; `environ` None is the process's environment.

    `ZIF_CPU_THREADS` goes before `OMP_NUM_THREADS`. Raises `ConfigError` on a value that is no count of threads.
    """
    variables = os.environ if environ is None else environ
    for name in _THREAD_VARIABLES:
        if variables.get(name):
            return CpuSettings(num_threads=_thread_count(name, variables[name]))
    return CpuSettings()


def _thread_count(name: str, text: str) -> int:
    # OpenMP allows a list, one count per nesting level; the first is the one that torch uses.
    first = text.split(",")[0].strip()
    if not first.isdecimal() or not 1 <= int(first) <= 4096:
        raise ConfigError(f"environment variable {name}={text!r} must be a number of threads from 1 to 4096")
    return int(first)
