"""Fixtures that only the tests with models, or with several ranks, use. The others are in `zif_conformance.plugin`."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from zif.errors import PlatformUnavailableError
from zif_conformance.subject import Subject

if TYPE_CHECKING:
    from zif_conformance.ranks.fleet import Fleet
    from zif_conformance.tiny_models.models import TinyModels


@pytest.fixture(scope="session")
def tiny(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> "TinyModels":
    """Tiny models for the platform under test."""
    from zif_conformance.tiny_models.models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("tiny-models"), subject)


@pytest.fixture(scope="module")
def fleets(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], "Fleet"]]:
    """Start ranks when they are first asked for, and keep them; those that a test has killed are replaced."""
    from zif_conformance.ranks.fleet import Fleet

    running: dict[int, Fleet] = {}

    def fleet(size: int) -> Fleet:
        if size not in running:
            running[size] = Fleet(subject.name, size, tmp_path_factory.mktemp("groups")).__enter__()
        running[size].revive()
        return running[size]

    yield fleet
    for held in running.values():
        held.__exit__()


@pytest.fixture
def ranks(fleets: Callable[[int], "Fleet"], request: pytest.FixtureRequest) -> "Fleet":
    """Return so many ranks as the test wants, or two where there is no room for more."""
    try:
        return fleets(request.param)
    except PlatformUnavailableError:
        return fleets(2)
