"""Garbage collection stays out of the way of imports. Used by whoever imports much: `zif` itself and the engine."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Collect no garbage meanwhile: what imports make stays, and is walked hundreds of times to find nothing.

    Where something was imported, all objects count as old afterwards, so that no later collection of young ones walks
    them either. Else they do not: garbage that is called old too often is never collected.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()
        if len(sys.modules) > num_modules and not gc.get_freeze_count():
            # Together they only make all objects old.
            gc.freeze()
            gc.unfreeze()
