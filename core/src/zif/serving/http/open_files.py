"""How many files this process may hold open, of which every connection is one (getrlimit(2), RLIMIT_NOFILE)."""

import contextlib
import resource

RESERVED_FILES = 128
"""What the process opens besides connections: libraries, sockets and pipes of its other processes, files of models."""


def raise_open_files(max_connections: int) -> int:
    """Raise the soft limit to what so many connections need, as far as the hard one goes.

    Returns how many files are missing all the same, 0 in the usual case.
    """
    needed = max_connections + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):  # a kernel may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 0 if soft == resource.RLIM_INFINITY else max(0, needed - soft)
