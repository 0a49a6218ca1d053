"""Steps that raise: which of them an engine can outlive, and what is told of them. `engine.py` is the only caller."""

from collections.abc import Iterable
from dataclasses import dataclass

from zif.contract import CommunicatorError, StepFuture, StepResult
from zif.errors import ContractError, DeviceLostError

_FATAL = (DeviceLostError, CommunicatorError, ContractError)
"""After these the device, the group of ranks or the runner is not what it was."""


@dataclass(frozen=True, slots=True)
class FailedStep:
    """The `StepFuture` of a step that could not even be submitted."""

    error: Exception

    def result(self) -> StepResult:
        raise self.error


def is_survivable(error: Exception) -> bool:
    """Say whether the device may compute other requests after this."""
    return not isinstance(error, _FATAL)


def step_error(error: Exception) -> str:
    """Return what the request that made a step raise is told: callers may read it, so no more than the kind."""
    return f"computing this request raised {type(error).__name__}; the log of the engine has the cause"


def wait_for(futures: Iterable[StepFuture]) -> None:
    """Wait until steps whose results are void write no more. Raises what no engine outlives."""
    for future in futures:
        try:
            future.result()
        except Exception as error:
            if not is_survivable(error):
                raise
