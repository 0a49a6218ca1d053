"""How many threads compute, and how they wait. Settings modules of plugins pass in the process's environment."""

import sys
from collections.abc import Iterable, Mapping, MutableMapping

from zif.errors import ConfigError

_SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPIN_COUNT = "1000"


def thread_count(environ: Mapping[str, str], names: Iterable[str]) -> int | None:
    """Return the number of threads in the first of the variables `names` that is set; None when none is.

    Raises `ConfigError` on a value that is no count of threads.
    """
    for name in names:
        if environ.get(name):
            return _count(name, environ[name])
    return None


def limit_spinning(environ: MutableMapping[str, str]) -> None:
    """Let OpenMP threads sleep soon when they wait for each other, unless the user says how they should wait.

    By default they spin so long that one busy neighbour slows small steps many times over. The runtime reads the
    variable when torch loads it, so this does nothing once torch is imported. Mutates `environ`. (libgomp manual,
    GOMP_SPINCOUNT.)
    """
    if "torch" not in sys.modules and not any(name in environ for name in _SPIN_VARIABLES):
        environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


def _count(name: str, text: str) -> int:
    # OpenMP allows a list, one count per nesting level; the first is the one that torch uses.
    first = text.split(",")[0].strip()
    if not first.isdecimal() or not 1 <= int(first) <= 4096:
        raise ConfigError(f"environment variable {name}={text!r} must be a number of threads from 1 to 4096")
    return int(first)
