"""The CPU plugin's own settings: the one place of this package that touches the environment.

Called by the platform and the device.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from zif.errors import ConfigError

_THREAD_VARIABLES = ("ZIF_CPU_THREADS", "OMP_NUM_THREADS")
_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPIN_COUNT = "1000"


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


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon when they wait for each other, unless the user says how they should wait.

    By default they spin so long that one busy neighbour slows small steps many times over. The runtime reads the
    variable when torch loads it, so this does nothing once torch is imported. Mutates the process's environment.
    (libgomp manual, GOMP_SPINCOUNT.)
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SPIN_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


def _thread_count(name: str, text: str) -> int:
    # OpenMP allows a list, one count per nesting level; the first is the one that torch uses.
    first = text.split(",")[0].strip()
    if not first.isdecimal() or not 1 <= int(first) <= 4096:
        raise ConfigError(f"environment variable {name}={text!r} must be a number of threads from 1 to 4096")
    return int(first)
