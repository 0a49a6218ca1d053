"""How a test of the suite declares itself: level, gate, clauses, claims, deadline. No test runs here.

    @conforms(level="L3", gate="G0", clause="8.3", claims=(Feature.ATTENTION_SLIDING_WINDOW,))
    @pytest.mark.parametrize("dtype", cases("dtype", "float32", "bfloat16"))
    def test_window_border(device, dtype): ...

Called by the test files and, to read the declarations, by `zif_conformance.plugin`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import pytest

from zif.contract import Collective, Feature
from zif_conformance.claims import claim_name

LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5", "L6", "L7", "L8", "L9")
GATES = ("G0", "G1", "G2", "G3", "G4", "G5", "G6", "G7", "none")

_DECLARATION_MARK = "conforms"
_CLAIMS_MARK = "exercises"


class Safety(StrEnum):
    """What a failure of the test would endanger; memory safety cannot be waived."""

    ORDINARY = "ordinary"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Declaration:
    """What one test says about itself.

    `clauses` are numbers of `docs/contract.md`. `claims` are the names of `zif_conformance.claims` that the test
    exercises: it runs only on platforms that claim all of them. `negative` tests expect a refusal, an error, or
    survive a fault. `isolated` tests get a process of their own.
    """

    level: str
    gate: str
    clauses: tuple[str, ...]
    claims: tuple[str, ...] = ()
    negative: bool = False
    deadline_s: float = 60.0
    safety: Safety = Safety.ORDINARY
    isolated: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError` on a level or gate that does not exist, or on no clause."""
        if self.level not in LEVELS or self.gate not in GATES:
            raise ValueError(f"level={self.level!r} and gate={self.gate!r} must be of {LEVELS} and {GATES}")
        if not self.clauses or self.deadline_s <= 0:
            raise ValueError(f"clauses={self.clauses!r} must name one, deadline_s={self.deadline_s!r} be above 0")

    @property
    def waivable(self) -> bool:
        """Say whether a vendor may waive a failure."""
        return self.gate not in ("G0", "G1") and self.safety is Safety.ORDINARY

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {**asdict(self), "clauses": list(self.clauses), "claims": list(self.claims), "safety": self.safety.value}


def conforms(
    *,
    level: str,
    clause: str | Sequence[str],
    gate: str = "none",
    claims: Sequence[Feature | Collective | str] = (),
    **options: Any,
) -> pytest.MarkDecorator:
    """Declare a test. `options` are the other fields of `Declaration`. Raises `ValueError` on impossible values."""
    clauses = (clause,) if isinstance(clause, str) else tuple(clause)
    declaration = Declaration(level, gate, clauses, tuple(map(claim_name, claims)), **options)
    mark: pytest.MarkDecorator = getattr(pytest.mark, _DECLARATION_MARK)
    return mark(declaration)


def exercises(*claims: Feature | Collective | str) -> pytest.MarkDecorator:
    """Add claims to one parameter of a test: `pytest.param(x, marks=exercises("dtype:bfloat16"))`."""
    mark: pytest.MarkDecorator = getattr(pytest.mark, _CLAIMS_MARK)
    return mark(*map(claim_name, claims))


def cases(kind: str, *values: object) -> list[Any]:
    """Return parameters that each exercise the claim `kind:value`: `cases("dtype", "float32", "bfloat16")`."""
    return [pytest.param(value, marks=exercises(f"{kind}:{value}"), id=str(value)) for value in values]


def declaration_of(item: pytest.Item) -> Declaration | None:
    """Return what the test declares, claims of its parameters included, or None when it is not of a suite."""
    mark = item.get_closest_marker(_DECLARATION_MARK)
    if mark is None:
        return None
    declared: Declaration = mark.args[0]
    more = [claim for extra in item.iter_markers(_CLAIMS_MARK) for claim in extra.args]
    claims = tuple(dict.fromkeys((*declared.claims, *more)))
    fields = {name: getattr(declared, name) for name in ("negative", "deadline_s", "safety", "isolated")}
    return Declaration(declared.level, declared.gate, declared.clauses, claims, **fields)
