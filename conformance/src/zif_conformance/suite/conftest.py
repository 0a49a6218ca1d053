"""Fixtures that only the tests with models use. The others are in `zif_conformance.plugin`."""

from typing import TYPE_CHECKING

import pytest

from zif_conformance.subject import Subject

if TYPE_CHECKING:
    from zif_conformance.tiny_models.models import TinyModels


@pytest.fixture(scope="session")
def tiny(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> "TinyModels":
    """Tiny models for the platform under test."""
    from zif_conformance.tiny_models.models import TinyModels

    return TinyModels(tmp_path_factory.mktemp("tiny-models"), subject)
