"""The native library, once for each instruction set that this processor runs."""

import pytest

from zif_cpu.library import Library, load_library

_LOADED = load_library()


@pytest.fixture(params=_LOADED.isas if isinstance(_LOADED, Library) else ["none"])
def library(request):
    """The library with one instruction set and two threads; the best one is in use again afterwards."""
    if not isinstance(_LOADED, Library):
        pytest.skip(_LOADED)
    _LOADED.use(request.param, 2)
    yield _LOADED
    _LOADED.use(_LOADED.isas[-1], 1)
