"""The claims of a device as names, and which level of the suite has to prove each of them.

A claim is `kind:value` ("feature:attention.full", "dtype:bfloat16", "head_size:64") or a word ("batch_invariant").
Called by the marks, the pytest plugin and `verify`; knows `Capabilities`, no test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zif.contract import Capabilities, Collective, Feature

FLAGS = ("graph_capture", "batch_invariant", "fork_safe", "spawn_safe", "static_code")
INJECTION = "fault_injection"
"""Claimed by a note that begins with "faults: " and names the environment variable that lets faults happen."""
INJECTION_NOTE = "faults: "
COMPUTING = "computing"
"""Claimed by all devices but those with a note that begins with "computes nothing"; every level but L0 needs it."""
IDLE_NOTE = "computes nothing"
KINDS = ("feature", "dtype", "kv_dtype", "block_size", "head_size", "collective", "collective_dtype")

HARDWARE = "hardware"
"""Claimed by all devices but simulated ones, whose speed says nothing."""

_WORDS = (*FLAGS, INJECTION, COMPUTING, HARDWARE)
_CORE = ("L0", "L1", "L2", "L3", "L5")
_HOME_LEVELS = {
    f"feature:{Feature.TENSOR_PARALLEL.value}": ("L6",),
    "collective": ("L6",),
    "collective_dtype": ("L6",),
    "graph_capture": ("L4",),
    "batch_invariant": ("L4",),
    "static_code": ("L8",),
    INJECTION: ("L7",),
}


def claim_name(claim: Feature | Collective | str) -> str:
    """Return the name of a claim. Raises `ValueError` on one that no device can make."""
    if isinstance(claim, Feature):
        return f"feature:{claim.value}"
    if isinstance(claim, Collective):
        return f"collective:{claim.value}"
    kind, colon, value = claim.partition(":")
    known = (kind in KINDS and bool(value)) if colon else claim in _WORDS
    if not known or (kind == "feature" and value not in {feature.value for feature in Feature}):
        raise ValueError(f"claim {claim!r} is none: give kind:value with a kind of {KINDS}, or one of {_WORDS}")
    return claim


def home_levels(claim: str) -> tuple[str, ...]:
    """Return the levels of which one has to exercise the claim."""
    return _HOME_LEVELS.get(claim) or _HOME_LEVELS.get(claim.partition(":")[0]) or _CORE


@dataclass(frozen=True, slots=True)
class Claims:
    """What a device claims. `names` are all claims that tests have to exercise; head sizes may be a range besides.

    A device that does not compute has nothing to exercise, whatever it plans for.
    """

    names: frozenset[str]
    head_sizes: tuple[int, ...]
    max_head_size: int
    computes: bool = True
    simulated: bool = False

    @classmethod
    def of(cls, capabilities: Capabilities) -> "Claims":
        """Read the claims of a device."""
        return cls.from_json(capabilities_json(capabilities))

    @classmethod
    def from_json(cls, declared: Mapping[str, Any]) -> "Claims":
        """Read the claims from what `capabilities_json` returned."""
        names = {f"feature:{name}" for name in declared["features"]}
        names |= {f"dtype:{numerics['storage']}" for numerics in declared["dtypes"]}
        names |= {f"kv_dtype:{name}" for name in declared["kv_dtypes"]}
        names |= {f"block_size:{size}" for size in declared["block_sizes"]}
        names |= {f"head_size:{size}" for size in declared["head_sizes"]}
        names |= {f"collective:{name}" for name in declared["collectives"]}
        names |= {f"collective_dtype:{name}" for name in declared["collective_dtypes"]}
        names |= {flag for flag in FLAGS if declared.get(flag, False)}
        names |= {INJECTION for note in declared["notes"] if note.startswith(INJECTION_NOTE)}
        computes = not any(note.startswith(IDLE_NOTE) for note in declared["notes"])
        sizes = tuple(declared["head_sizes"]), declared["max_head_size"]
        return cls(frozenset(names), *sizes, computes, declared.get("simulated", False))

    def has(self, claim: Feature | Collective | str) -> bool:
        """Say whether the device claims it."""
        name = claim_name(claim)
        kind, _, value = name.partition(":")
        if name == COMPUTING:
            return self.computes
        if name == HARDWARE:
            return not self.simulated
        if kind == "head_size" and not self.head_sizes:
            return 1 <= int(value) <= self.max_head_size
        return name in self.names


def capabilities_json(capabilities: Capabilities) -> dict[str, Any]:
    """Return capabilities as JSON holds them, sets sorted."""
    declared: dict[str, Any] = {field.name: getattr(capabilities, field.name) for field in fields(capabilities)}
    for name in ("kv_dtypes", "block_sizes", "head_sizes", "collective_dtypes", "notes"):
        declared[name] = list(declared[name])
    for name in ("features", "collectives"):
        declared[name] = sorted(member.value for member in declared[name])
    declared["dtypes"] = [
        {"storage": n.storage, "compute": n.compute, "accumulate": n.accumulate} for n in capabilities.dtypes
    ]
    return declared
