"""The model runner: the one part that computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from zif.contract.kv import KVArena
from zif.contract.model import ModelDescription
from zif.contract.step import StepFuture, StepPlan

Progress = Callable[[int, int], None]
"""Called with (bytes or units done, total) while something long runs."""


class ModelRunner(ABC):
    """Run steps of one model on one device. Core ships one for the torch tier; a vendor may bring its own.

    Order of calls: `load`, `start`, any number of `submit`, `close`. Calls come from one thread.
    """

    @abstractmethod
    def load(self, model: ModelDescription, progress: Progress) -> None:
        """Read the weights to the device. Raises `ModelError` or `OutOfMemoryError`."""

    @abstractmethod
    def start(self, arena: KVArena) -> None:
        """Allocate the KV arena and make ready for steps."""

    @abstractmethod
    def submit(self, step: StepPlan) -> StepFuture:
        """Begin a step. Steps complete in the order in which they were submitted."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and device back. Idempotent."""
