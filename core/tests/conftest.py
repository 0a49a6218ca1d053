"""Kernels run in Triton's interpreter here: it must be chosen before triton is imported. Code made of data is seen."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.audited import code_audit

os.environ.setdefault("TRITON_INTERPRET", "1")
_AUDITED = str(Path(code_audit.__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_AUDITED, os.environ.get("PYTHONPATH"))))
_WATCH = code_audit.install()


@pytest.fixture(autouse=True)
def no_data_becomes_code() -> Iterator[None]:
    """Fail a test in which the server evaluated, unpickled, unmarshalled or gave to a shell what is data."""
    _WATCH.found.clear()
    yield
    assert _WATCH.found == []
