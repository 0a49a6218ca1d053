"""Faults."""

from zif_conformance.mutants.bank import Mutant

MUTANTS: tuple[Mutant, ...] = ()
