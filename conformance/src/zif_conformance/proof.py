"""What a running test leaves for the report: claims it exercised, claims it lacked, distances to gates.

Kept in pytest's `user_properties` of the test, from where `zif_conformance.recording` reads them.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from zif.contract import Collective, Feature
from zif_conformance.claims import Claims, claim_name

PROVEN, MISSING, MEASURED = "zif_proven", "zif_missing", "zif_measured"

Properties = list[tuple[str, Any]]


class Proof:
    """The claims that one test exercised or lacked."""

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    def prove(self, *claims: Feature | Collective | str) -> None:
        """Count claims as exercised."""
        self._properties += [(PROVEN, claim_name(claim)) for claim in claims]

    def lack(self, claims: Iterable[str]) -> None:
        """End the test as unsupported for want of these claims."""
        names = list(claims)
        self._properties += [(MISSING, name) for name in names]
        pytest.skip(f"the platform does not claim {', '.join(names)}")


class GateRecorder:
    """Notes how near results came to their gates."""

    def __init__(self, properties: Properties) -> None:
        self._properties = properties

    def __call__(self, gate: str, error: float, limit: float, what: str = "") -> None:
        """Note one comparison; whether it holds is the caller's to assert."""
        # JSON has no word for NaN or infinity; either is as far from a gate as can be.
        spoken = float(error) if math.isfinite(error) else sys.float_info.max
        self._properties.append((MEASURED, {"gate": gate, "error": spoken, "limit": float(limit), "what": what}))


def missing_claims(claims: Claims, names: Iterable[Feature | Collective | str]) -> tuple[str, ...]:
    """Return the names that the device does not claim."""
    return tuple(claim_name(name) for name in names if not claims.has(name))
