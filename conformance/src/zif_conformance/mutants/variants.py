"""V."""

from zif_conformance.mutants.bank import Variant

VARIANTS: tuple[Variant, ...] = ()
