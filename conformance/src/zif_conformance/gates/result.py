"""What a gate says of one comparison. The gates make it, tests hold it, the bundle prints it."""

from collections.abc import Callable
from dataclasses import dataclass

Record = Callable[..., None]
"""Takes gate, measured, limit and what was compared; the fixture `record_gate`."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """`measured` against `limit`, in the gate's own measure; `where` says what was compared and where it is worst."""

    gate: str
    measured: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Say whether the gate holds. A NaN does not."""
        return self.measured <= self.limit

    @property
    def headroom(self) -> float:
        """Return how many times the measured value fits into the limit; infinite when nothing was measured."""
        return float("inf") if self.measured == 0 else self.limit / self.measured

    @property
    def message(self) -> str:
        """Say in one line what is wrong."""
        return f"gate {self.gate}: {self.where}: measured {self.measured:.6g}, limit {self.limit:.6g}"


def hold(record: Record, *results: GateResult) -> None:
    """Record every result, then assert that all passed."""
    for result in results:
        record(result.gate, result.measured, result.limit, result.where)
    failed = [result.message for result in results if not result.passed]
    assert not failed, "\n".join(failed)
