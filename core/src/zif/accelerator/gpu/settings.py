"""The variables of Triton and OpenMP that mean the same on all GPUs: the one place here that reads the environment."""

import os
from collections.abc import Mapping

from zif.host.threads import thread_count

INTERPRET = "TRITON_INTERPRET"

_YES = ("1", "true", "on", "yes", "y")


def is_interpreted(environ: Mapping[str, str] | None = None) -> bool:
    """Say whether Triton interprets kernels, as it reads the variable; `environ` None is the process's environment."""
    return (os.environ if environ is None else environ).get(INTERPRET, "").lower() in _YES


def num_threads(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the threads that `OMP_NUM_THREADS` grants the interpreter, None where it is not set.

    Raises `ConfigError` when it is no count.
    """
    return thread_count(os.environ if environ is None else environ, ("OMP_NUM_THREADS",))
