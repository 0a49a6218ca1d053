"""Garbage collection rests while much is imported, and is as it was afterwards."""

import contextlib
import gc
import sys
import types
from collections.abc import Iterator

import pytest

import zif
from zif.engine.garbage import collection_paused


@pytest.fixture(autouse=True)
def _collection_as_it_was() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_rests_meanwhile_and_is_as_it_was_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with contextlib.suppress(KeyError), collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() == enabled


def test_pauses_within_a_pause() -> None:
    gc.enable()
    with collection_paused():
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def is_young(value: object) -> bool:
    return any(value is each for generation in (0, 1) for each in gc.get_objects(generation))


def test_what_was_made_counts_as_old_where_something_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.disable()
    with collection_paused():
        made: list[int] = []
    assert is_young(made)
    with collection_paused():
        monkeypatch.setitem(sys.modules, "imported_meanwhile", types.ModuleType("imported_meanwhile"))
    assert not is_young(made)


def test_a_public_name_pauses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(zif), "SamplingParams", raising=False)
    params = zif.SamplingParams
    monkeypatch.setattr(zif, "__getattr__", None)
    assert zif.SamplingParams is params


def test_what_a_program_has_frozen_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    if gc.get_freeze_count():
        pytest.skip("this process has frozen objects already")
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with collection_paused():
            monkeypatch.setitem(sys.modules, "imported_meanwhile", types.ModuleType("imported_meanwhile"))
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()
