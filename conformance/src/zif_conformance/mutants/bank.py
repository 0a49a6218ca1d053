"""What a mutant and a variant are, and the list of all. Applies and runs nothing.

`level` is the level of the suite that decides about it. Some changes must be seen by every interpreter that a test
starts: how the package is found and imported, what it claims, what ranks do. Such a mutant or variant is `fresh`, and
gets a copy of the package with the change in its source.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """In `file` of the reference platform, `before` stands exactly once; the mutant has `after` there."""

    file: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault. `broken` says what is wrong; `origin` names the class of reports that it is taken from."""

    name: str
    level: str
    broken: str
    origin: str
    edits: tuple[Edit, ...]
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way to keep the contract: the whole level must pass."""

    name: str
    level: str
    other: str
    edits: tuple[Edit, ...]
    fresh: bool = False


Subject = Mutant | Variant
"""What a trial is about."""


def by_name(mutants: Iterable[Mutant], variants: Iterable[Variant]) -> dict[str, Subject]:
    """Return all of them by their names."""
    subjects: list[Subject] = [*mutants, *variants]
    return {subject.name: subject for subject in subjects}


def all_mutants() -> tuple[Mutant, ...]:
    """Return the bank."""
    from zif_conformance.mutants import (
        attention,
        choices,
        collectives,
        heads,
        hooks,
        kv_int8,
        masks,
        memory,
        models,
        operators,
        package,
        planning,
        prepared,
        products,
        quantization,
        tables,
    )

    rooms = (
        package,
        planning,
        memory,
        operators,
        choices,
        products,
        heads,
        prepared,
        quantization,
        masks,
        attention,
        tables,
        kv_int8,
        models,
        hooks,
        collectives,
    )
    return tuple(mutant for room in rooms for mutant in room.MUTANTS)


def all_variants() -> tuple[Variant, ...]:
    """Return the legitimate variants."""
    from zif_conformance.mutants import prepared, quantization, variants

    return (*variants.VARIANTS, *prepared.VARIANTS, *quantization.VARIANTS)
