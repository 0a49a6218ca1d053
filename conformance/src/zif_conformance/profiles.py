"""Profiles: fixed, versioned lists of the tests that a platform must pass to carry their name.

The lists are data, one file per profile in `data/`, one test id per line under a line with the version. They are
regenerated on purpose (`python -m zif_conformance.freeze`), never from what a run happened to collect.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

from zif.contract import Feature
from zif.errors import ConfigError
from zif_conformance.claims import claim_name
from zif_conformance.marks import LEVELS
from zif_conformance.outcomes import TestCase

_CORE = ("L0", "L1", "L2", "L3", "L5")
_SERVING = (*_CORE, "L4", "L7", "L8")
_LEVELS_OF = {
    "core": _CORE,
    "serving": _SERVING,
    "distributed": (*_SERVING, "L6"),
    "quantized-w8a8": ("L2", "L5"),
    "quantized-w8a16": ("L2", "L5"),
    "quantized-w4a16": ("L2", "L5"),
}
_CLAIM_OF = {
    "quantized-w8a8": claim_name(Feature.QUANTIZATION_W8A8),
    "quantized-w8a16": claim_name(Feature.QUANTIZATION_W8A16),
    "quantized-w4a16": claim_name(Feature.QUANTIZATION_W4A16),
}
"""Profiles of one claim: of their levels they have the tests that exercise it, and the platform has to make it."""
PROFILE_NAMES = tuple(_LEVELS_OF)
PROFILE_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class Profile:
    """A must-pass list. `must_pass` are test ids, in the order of levels. `claim`: what it is about; "": everything."""

    name: str
    version: str
    levels: tuple[str, ...]
    must_pass: tuple[str, ...]
    claim: str = ""

    @property
    def selection(self) -> frozenset[str] | None:
        """Return the tests to run where the levels have many others; None: all of the levels."""
        return frozenset(self.must_pass) if self.claim else None


def profile(name: str) -> Profile:
    """Return the profile of this name. Raises `ConfigError` with the nearest name."""
    if name not in _LEVELS_OF:
        raise ConfigError(f"unknown profile {name!r}; {_hint(name, PROFILE_NAMES)}profiles: {', '.join(PROFILE_NAMES)}")
    text = resources.files("zif_conformance").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
    first, *ids = text.splitlines()
    return Profile(name, first.removeprefix("version "), levels_of(name), tuple(ids), _CLAIM_OF.get(name, ""))


def levels_of(name: str) -> tuple[str, ...]:
    """Return the levels of a profile, lowest first."""
    return tuple(sorted(_LEVELS_OF[name]))


def profile_text(name: str, cases: Iterable[TestCase]) -> str:
    """Return the data file of a profile, given all tests of the suite."""
    inside = [case for case in cases if case.declaration.level in _LEVELS_OF[name]]
    claim = _CLAIM_OF.get(name)
    chosen = sorted(case.test_id for case in inside if claim is None or claim in case.declaration.claims)
    return "\n".join((f"version {PROFILE_VERSION}", *chosen)) + "\n"


def parse_levels(text: str) -> tuple[str, ...]:
    """Read `L0,L3` or `l0-l3`. Raises `ConfigError` on a level that there is not."""
    chosen: list[str] = []
    for part in text.upper().replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        for level in (first, last) if dash else (first,):
            if level not in LEVELS:
                raise ConfigError(
                    f"unknown level {level!r}; {_hint(level, LEVELS)}levels: L0 to L9, as in L0,L3 or L0-L3"
                )
        chosen += LEVELS[LEVELS.index(first) : LEVELS.index(last or first) + 1]
    return tuple(dict.fromkeys(chosen))


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
